"""Makes clips like those that download scripts leave: 10 s at 30 frames per second, H.264 with libx264's defaults.

libx264's defaults are crf 23, a keyframe each 250 frames and B-frames. The pictures are textures whose spectrum falls
off as that of photographs on the web does (STEEPNESS), under a moving, turning and zooming camera, with an
object that moves on its own and a little grain; the same seed gives the same pictures.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch
from torch.nn import functional

SECONDS, FRAME_RATE = 10, 30
TEXTURE = 768  # pixels of each side
STEEPNESS = (
    1.3  # amplitude is frequency to minus this: 1 for nature itself, more for small and compressed pictures of it
)
GRAIN = 1.0  # deviation in steps of 8 bits


def make_raw_clip(path: Path, seed: int, height: int = 256, width: int = 340) -> Path:
    """Writes a clip and returns its path."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in pictures(seed, height, width):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def pictures(seed: int, height: int, width: int, frames: int = SECONDS * FRAME_RATE) -> Iterator[np.ndarray]:
    """Yields the pictures of a clip, `(height, width, 3)` uint8."""
    random = np.random.default_rng(seed)
    background, surface = _texture(random), _texture(random)
    grain = random.normal(0, GRAIN, (8, height, width, 1)).astype(np.float32)
    paces, phases = random.uniform(0.3, 1.2, 8), random.uniform(0, 2 * math.pi, 8)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    for number in range(frames):
        sway = np.sin(2 * math.pi * paces * number / FRAME_RATE / 4 + phases)
        scene = _seen(background, rows, columns, 0.15 * sway[0], 0.45 + 0.1 * sway[1], 0.35 * sway[2], 0.35 * sway[3])
        place = (columns - 0.6 * float(sway[4])) ** 2 + (rows - 0.6 * float(sway[5])) ** 2
        shown = torch.sigmoid((0.12 + 0.05 * float(sway[6]) - place) * 60)[..., None]
        thing = _seen(surface, rows, columns, sway[7], 0.5, 0.4 * sway[5], 0.4 * sway[4])
        picture = scene * (1 - shown) + thing * shown + torch.from_numpy(grain[number % len(grain)])
        yield picture.round().clamp(0, 255).to(torch.uint8).numpy()


def _texture(random: np.random.Generator) -> torch.Tensor:
    """A random picture, `(1, 3, TEXTURE, TEXTURE)`, whose colours are alike but for a third."""
    noise = random.standard_normal((TEXTURE, TEXTURE, 1)) + random.standard_normal((TEXTURE, TEXTURE, 3)) / 3
    frequency = np.hypot(np.fft.fftfreq(TEXTURE)[:, None], np.fft.rfftfreq(TEXTURE)[None])[..., None]
    amplitude = np.maximum(frequency, 1 / TEXTURE) ** -STEEPNESS
    picture = np.fft.irfft2(np.fft.rfft2(noise, axes=(0, 1)) * amplitude, s=(TEXTURE, TEXTURE), axes=(0, 1))
    picture = 118 + 48 * (picture - picture.mean()) / picture.std()
    return torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None]


def _seen(
    texture: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    turn: float,
    zoom: float,
    down: float,
    right: float,
) -> torch.Tensor:
    """What a camera sees of a texture, `(H, W, 3)`; places and zoom are shares of half the texture."""
    aspect = rows.shape[0] / columns.shape[1]
    x, y = columns, rows * aspect
    cosine, sine = math.cos(turn), math.sin(turn)
    grid = torch.stack([zoom * (cosine * x - sine * y) + right, zoom * (sine * x + cosine * y) + down], dim=-1)
    sampled = functional.grid_sample(
        texture, grid[None].float(), mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return sampled[0].permute(1, 2, 0)
