"""Opening a packed video and reading the 16 frames of a clip: PyAV against decord, as ratios.

Both read the same bytes in turns, one thread each, so that a noisy machine hits both alike. A clip of 24 x 24 pixels,
as in the demo, is where opening dominates. Run with `make bench`.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from pretrain.data.clips import ClipConfig, frame_indices
from pretrain.data.pyav_reader import PyAvReader
from pretrain.data.transcode import transcode
from pretrain.data.video import DecordReader
from tests.videos import make_video, moving_square

CLIP = ClipConfig(frames=16, frame_rate=7.5)
ROUNDS = 41
# Name: stored frames, their rate in frames per second, height and width in pixels.
VIDEOS = {
    "10 s at 7.5 frames per second": (75, 7.5, 256, 340),
    "10 s at 30 frames per second": (300, 30, 256, 340),
    "32 x 32 pixels": (20, 7.5, 32, 32),
    "24 x 24 pixels": (20, 7.5, 24, 24),
}


def packed(folder: Path, frames: int, rate: float, height: int, width: int) -> bytes:
    """Returns a video as packing writes it, of a moving square with a little grain."""
    grain = np.random.default_rng(0).integers(0, 8, (frames, height, width, 1), dtype=np.uint8)
    pictures = moving_square(frames, height, width, seed=3) // 2 + grain
    return transcode(make_video(folder / "source.mp4", frame_rate=rate, pictures=pictures)).video


def main() -> None:
    """Prints the medians, and the median and the quartiles of the ratios."""
    for name, (frames, rate, height, width) in VIDEOS.items():
        with tempfile.TemporaryDirectory() as folder:
            video = packed(Path(folder), frames, rate, height, width)
        seconds: dict[type, list[float]] = {DecordReader: [], PyAvReader: []}
        for round_number in range(ROUNDS + 1):
            indices, _ = frame_indices(CLIP, frames, rate, moment=round_number / ROUNDS)
            for reader, durations in seconds.items():
                started = time.perf_counter()
                reader(video).read(indices)
                if round_number:  # the first round warms up
                    durations.append(time.perf_counter() - started)
        decord, pyav = seconds.values()
        low, middle, high = statistics.quantiles(one / other for one, other in zip(decord, pyav, strict=True))
        print(
            f"{name}, {len(video) / 1024:.0f} KiB: decord {1000 * statistics.median(decord):.1f} ms, PyAV "
            f"{1000 * statistics.median(pyav):.1f} ms: PyAV is {middle:.2f} times as fast ({low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
