"""Videos for the demo: handwritten digits that drift over a textured background, made without any download.

The label is the direction of the drift. Digits leave on one side and come back on the other, starting anywhere, so a
single frame tells nothing about the label: only motion does. The light flickers and the film is grainy: nothing of that
can be predicted, so a masked autoencoder learns to look past it, while a classifier that starts from scratch has few
labels to learn the same from. The digits are scikit-learn's copy of the UCI set.
"""

import dataclasses
import functools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from PIL import Image
from scipy.special import ndtri
from sklearn.datasets import load_digits

from pretrain.data.randomness import key_for, permutation, raw_words, uniform

SIZE = 24  # pixels
FRAMES = 20
FRAME_RATE = 10
DIGITS = 2
DIGIT_SIZE = 14  # pixels
SPEED = 4  # pixels a frame, down or across: a tubelet's side in a tubelet's time
TEXTURES = 2
FLICKER = 0.5  # from the darkest to the brightest light, where 1 is from black to white
GRAIN = 0.09  # standard deviation
TEST_SHARE = 0.2  # of the handwritten digits; the other splits never show these

# Names of the four directions, with their (down, right) parts.
MOTIONS = {"down": (1, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0)}


@dataclasses.dataclass(frozen=True)
class Split:
    """Videos to make.

    Attributes:
        folder: Where to write them; labelled ones go to one folder for each motion.
        name: Keys the videos, so that no two splits share one; `test` takes digits that no other split uses.
        count: How many, equally many of each motion.
        labelled: Whether their folders tell the motion.
    """

    folder: Path
    name: str
    count: int
    labelled: bool


def write_videos(splits: list[Split], seed: int, jobs: int = 2) -> None:
    """Writes the H.264 videos of all splits with `jobs` processes; a pure function of the seed."""
    motions = list(MOTIONS)
    tasks = []
    for split in splits:
        for number in range(split.count):
            motion = motions[number % len(motions)]
            parent = split.folder / motion if split.labelled else split.folder
            parent.mkdir(parents=True, exist_ok=True)
            key = key_for(seed, split.name, number)
            tasks.append((parent / f"{number:05d}.mp4", motion, key, split.name == "test"))
    with ProcessPoolExecutor(jobs, mp_context=get_context("forkserver")) as pool:
        list(pool.map(_write_video, tasks, chunksize=64))


def draw_frames(motion: str, key: int, test: bool = False) -> np.ndarray:
    """Returns `(FRAMES, SIZE, SIZE, 3)` uint8: digits that drift together; a pure function of its arguments."""
    words = raw_words(key, DIGITS + 1)
    texture = _texture(key_for("texture", int(words[DIGITS] % np.uint64(TEXTURES))))
    drift = uniform(key_for(key, "drift"), 5)
    start_down, start_right = drift[:2]
    ink = 0.7 + 0.3 * drift[2:]
    alpha = _digits(words[:DIGITS], uniform(key_for(key, "digits"), 2 * DIGITS).reshape(DIGITS, 2), test)
    light = FLICKER * (uniform(key_for(key, "light"), FRAMES * 3).reshape(FRAMES, 1, 1, 3) - 0.5)
    grain = GRAIN * ndtri(uniform(key_for(key, "grain"), FRAMES * SIZE * SIZE * 3)).reshape(FRAMES, SIZE, SIZE, 3)
    down, right = MOTIONS[motion]
    frames = []
    for time in range(FRAMES):
        shift = (round(start_down * SIZE) + down * SPEED * time, round(start_right * SIZE) + right * SPEED * time)
        moved = np.roll(alpha, shift, axis=(0, 1))
        frames.append(texture * (1 - moved) + ink * moved)
    return ((np.stack(frames) + light + grain).clip(0, 1) * 255).round().astype(np.uint8)


def _digits(words: np.ndarray, starts: np.ndarray, test: bool) -> np.ndarray:
    """Returns how much ink `(SIZE, SIZE, 1)` there is of digits chosen by `words`, each at its start in [0, 1)."""
    images = _digit_images(test)
    ink = np.zeros((SIZE, SIZE, 1))
    for word, start in zip(words, starts, strict=True):
        one = np.zeros((SIZE, SIZE, 1))
        one[:DIGIT_SIZE, :DIGIT_SIZE, 0] = images[int(word % np.uint64(len(images)))]
        ink = np.maximum(ink, np.roll(one, tuple((start * SIZE).astype(int)), axis=(0, 1)))
    return ink


@functools.cache
def _digit_images(test: bool) -> np.ndarray:
    """Returns digits `(n, DIGIT_SIZE, DIGIT_SIZE)` in [0, 1], enlarged smoothly."""
    images = load_digits().images / 16
    chosen = permutation(key_for("digits"), len(images))
    cut = int(len(images) * TEST_SHARE)
    images = images[chosen[:cut] if test else chosen[cut:]]
    enlarged = [Image.fromarray(image.astype(np.float32)).resize((DIGIT_SIZE, DIGIT_SIZE)) for image in images]
    return np.clip(np.stack([np.asarray(image) for image in enlarged]), 0, 1)


def _texture(key: int) -> np.ndarray:
    """Returns a static texture `(SIZE, SIZE, 3)` around a middle grey: waves in two directions, a little tinted."""
    draws = uniform(key, 9)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    waves = np.zeros((SIZE, SIZE))
    for angle, length, phase in draws[:6].reshape(2, 3):
        along = rows * np.sin(angle * np.pi) + columns * np.cos(angle * np.pi)
        waves += np.sin(2 * np.pi * (along / (8 + 8 * length) + phase)) / 2
    return 0.4 + 0.1 * waves[..., None] * (0.5 + 0.5 * draws[6:9])


def _write_video(task: tuple[Path, str, int, bool]) -> None:
    path, motion, key, test = task
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE, options={"preset": "veryfast", "crf": "16"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in draw_frames(motion, key, test):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
