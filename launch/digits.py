"""Videos for the demo: handwritten digits that drift over textured backgrounds, made without any download.

The label is the direction of the drift. Digits leave on one side and come back on the other, starting anywhere, so a
single frame tells nothing about the label: only motion does. The digits are scikit-learn's copy of the UCI set.
"""

import dataclasses
import functools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from pretrain.data.randomness import key_for, permutation, raw_words, uniform

SIZE = 32  # pixels
FRAMES = 20
FRAME_RATE = 10
DIGIT_SIZE = 16  # pixels
BACKGROUNDS = 4
SPEED = (1.0, 2.0)  # pixels a frame, down and across
TEST_SHARE = 0.2  # of the handwritten digits, drawn by other people's hands than those of the training clips

# Names of the eight directions, with their (down, right) parts.
MOTIONS = {
    "down": (1.0, 0.0),
    "down-left": (1.0, -1.0),
    "down-right": (1.0, 1.0),
    "left": (0.0, -1.0),
    "right": (0.0, 1.0),
    "up": (-1.0, 0.0),
    "up-left": (-1.0, -1.0),
    "up-right": (-1.0, 1.0),
}


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
    """Returns `(FRAMES, SIZE, SIZE, 3)` uint8: one drifting digit; a pure function of its arguments."""
    digits = _digit_images(test)
    digit = digits[int(raw_words(key, 1)[0] % np.uint64(len(digits)))]
    start_down, start_right, contrast, speed, *colours = uniform(key_for(key, "digit"), 7)
    background = _texture(key_for("background", int(raw_words(key, 2)[1] % np.uint64(BACKGROUNDS))))
    ink = np.array(colours) * 0.3 + 0.7
    alpha = np.zeros((SIZE, SIZE, 1))
    alpha[:DIGIT_SIZE, :DIGIT_SIZE, 0] = digit * (0.8 + 0.2 * contrast)
    down, right = MOTIONS[motion]
    pixels_per_frame = SPEED[0] + (SPEED[1] - SPEED[0]) * speed
    frames = []
    for time in range(FRAMES):
        shift = (
            round(start_down * SIZE + down * pixels_per_frame * time),
            round(start_right * SIZE + right * pixels_per_frame * time),
        )
        moved = np.roll(alpha, shift, axis=(0, 1))
        frames.append(background * (1 - moved) + ink * moved)
    return (np.stack(frames) * 255).round().astype(np.uint8)


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
    return 0.35 + 0.15 * waves[..., None] * (0.5 + 0.5 * draws[6:9])


def _write_video(task: tuple[Path, str, int, bool]) -> None:
    path, motion, key, test = task
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE, options={"preset": "veryfast", "crf": "16"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in draw_frames(motion, key, test):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
