"""What decoding in a process of its own costs: clips by way of the decode child against the same process, as ratios.

Both read the same packed video and cut a clip of it, in turns. Two processes on one core take turns too, so what counts
is the CPU time of both together; the time on the clock, which other work on the machine lengthens, stands beside it.
Run with `make bench`.
"""

import functools
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pretrain.data.clips import ClipConfig, cut, frame_indices, training_box
from pretrain.data.decode_client import open_video_apart
from pretrain.data.video import VideoReader, open_video
from tests.benchmarks.cpu_time import cpu_time_s
from tests.benchmarks.decode import packed

CLIP = ClipConfig(frames=16, frame_rate=7.5, size=224)
FRAMES, RATE, HEIGHT, WIDTH = 75, 7.5, 256, 340
ROUNDS = 25
CLIPS_PER_ROUND = 12


def read_and_cut(reader: VideoReader, number: int) -> None:
    """Reads and cuts a clip."""
    indices, _ = frame_indices(CLIP, FRAMES, RATE, moment=number * 0.618 % 1)
    frames = torch.from_numpy(reader.read(indices))
    torch.stack([cut(frames, training_box(CLIP, HEIGHT, WIDTH, key=number), CLIP.size)])


def main() -> None:
    """Prints the medians, and the median and the quartiles of the ratios of the rounds."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        video = packed(Path(folder), FRAMES, RATE, HEIGHT, WIDTH)
    ways = {"same process": open_video, "decode child": functools.partial(open_video_apart, limit_s=60.0)}
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for round_number in range(ROUNDS + 1):
        for way, opened in ways.items():
            clock, computed = time.perf_counter(), cpu_time_s()
            for number in range(CLIPS_PER_ROUND):
                read_and_cut(opened(video), CLIPS_PER_ROUND * round_number + number)
            if round_number:  # the first round warms up, and starts the child
                seconds[way].append((cpu_time_s() - computed, time.perf_counter() - clock))
    print(f"{CLIP.frames} frames of {WIDTH}x{HEIGHT} decoded and cut to {CLIP.size}, {len(video) / 1024:.0f} KiB:")
    for part, name in enumerate(("CPU time", "time on the clock")):
        same, child = ([1000 * times[part] / CLIPS_PER_ROUND for times in seconds[way]] for way in ways)
        low, middle, high = statistics.quantiles(there / here for here, there in zip(same, child, strict=True))
        print(
            f"{name}: same process {statistics.median(same):.1f} ms, decode child {statistics.median(child):.1f} ms: "
            f"{middle:.3f} times ({low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
