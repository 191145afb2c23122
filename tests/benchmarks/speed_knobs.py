"""What each choice of packing and loading does to speed and size: one knob turned at a time, as ratios to the default.

The default is what `tubelet pack --fps 7.5` writes. A clip is 16 frames of 224 x 224 at 7.5 frames per second, opened
from memory, decoded by decord, cropped and resized as in training; all settings in turns on one core, in CPU time. The
clips are made at 426 x 320, so that every short side is a reduction. Workers and prefetched batches are measured in
seconds of the clock, on all cores, while a consumer takes batches; resizing in the decoder is compared with ours on the
same crops. Run with `make bench-data`, or `python -m tests.benchmarks.speed_knobs --quick`.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import decord
import numpy as np
import torch

from pretrain.data import loader
from pretrain.data.clips import ClipConfig, cut, frame_indices, training_box
from pretrain.data.config import DataConfig
from pretrain.data.loader import MicroBatches, training_batches
from pretrain.data.mp4_encoder import CRF, PRESET
from pretrain.data.order import Order
from pretrain.data.pack import PackConfig, pack
from pretrain.data.randomness import key_for
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import TrainingClips
from pretrain.data.transcode import fitted_size
from pretrain.data.video import open_video
from tests.benchmarks.raw_clips import FRAME_RATE, make_raw_clip

CLIP = ClipConfig(frames=16, frame_rate=7.5)
HEIGHT, WIDTH = 320, 426


class Setting(NamedTuple):
    """How a video is stored; the defaults are those of packing."""

    gop: int = 16
    short_side: int = 256
    fps: float = 7.5
    tune: str | None = "fastdecode"
    profile: str | None = None
    b_frames: int = 0
    container: str = "mp4"


KNOBS = {
    "default": Setting(),
    "GOP 8": Setting(gop=8),
    "GOP 30": Setting(gop=30),
    "GOP 250": Setting(gop=250),
    "short side 128": Setting(short_side=128),
    "short side 192": Setting(short_side=192),
    "short side 224": Setting(short_side=224),
    "short side 320": Setting(short_side=320),
    "15 fps": Setting(fps=15),
    "30 fps": Setting(fps=30),
    "not tuned": Setting(tune=None),
    "not tuned, profile baseline": Setting(tune=None, profile="baseline"),
    "not tuned, profile main": Setting(tune=None, profile="main"),
    "2 B-frames": Setting(b_frames=2),
    "Matroska": Setting(container="matroska"),
}


def encoded(frames: list[av.VideoFrame], setting: Setting) -> bytes:
    """Returns a video of frames at 30 per second, stored as the setting says."""
    file = io.BytesIO()
    options = {"preset": PRESET, "crf": str(CRF), "bf": str(setting.b_frames), "sc_threshold": "0", "flags": "+cgop"}
    options |= {name: value for name in ("tune", "profile") if (value := getattr(setting, name))}
    width, height = fitted_size(frames[0].width, frames[0].height, setting.short_side)
    muxing = {"use_editlist": "0"} if setting.container == "mp4" else {}
    with av.open(file, "w", format=setting.container, options=muxing) as container:
        stream = container.add_stream("libx264", rate=Fraction(setting.fps), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.gop_size, context.thread_count = setting.gop, 1
        for number, frame in enumerate(frames[:: int(FRAME_RATE / setting.fps)]):
            picture = frame.reformat(width=width, height=height, format="yuv420p", interpolation="BICUBIC", threads=1)
            picture.pts, picture.time_base = number, 1 / Fraction(setting.fps)
            picture.pict_type = 0
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return file.getvalue()


def clip_of(video: bytes, fps: float, round_number: int) -> torch.Tensor:
    """Returns a clip as training cuts it, at a moment and with a crop that the round decides."""
    reader = open_video(video)
    indices, _ = frame_indices(CLIP, len(reader), fps, moment=(round_number * 0.618) % 1)
    frames = torch.from_numpy(reader.read(indices))
    return cut(frames, training_box(CLIP, *frames.shape[1:3], key_for(round_number)), CLIP.size)


def in_turns(ways: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Returns the median CPU time in seconds that each way takes, called with the number of the round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            way(round_number)
            if round_number:  # the first round warms up
                seconds[name].append(time.process_time() - started)
    return {name: statistics.median(durations) for name, durations in seconds.items()}


def compare_storage(raw: list[Path], rounds: int) -> None:
    """Prints speed and bytes of every setting as ratios to the default."""
    sources = []
    for path in raw:
        with av.open(str(path)) as container:
            sources.append(list(container.decode(video=0)))
    videos = {name: [encoded(frames, setting) for frames in sources] for name, setting in KNOBS.items()}

    def way(name: str) -> Callable[[int], object]:
        return lambda number: clip_of(videos[name][number % len(raw)], KNOBS[name].fps, number)

    seconds = in_turns({name: way(name) for name in KNOBS}, rounds)
    sizes = {name: sum(map(len, own)) / len(own) for name, own in videos.items()}
    print(f"default: {1 / seconds['default']:.1f} clips/s, {sizes['default'] / 1024:.0f} KiB for a video of 10 s")
    print(f"\n{'as ratios to the default':30s}{'speed':>8s}{'bytes':>8s}")
    for name in KNOBS:
        print(f"{name:30s}{seconds['default'] / seconds[name]:8.2f}{sizes[name] / sizes['default']:8.2f}")


def compare_resizing(raw: list[Path], rounds: int) -> None:
    """Prints how fast clips are that the decoder resizes, against ours, from the same crops."""
    sides = (256, 320)
    videos: dict[int, list[bytes]] = {side: [] for side in sides}
    for path in raw:
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
        for side in sides:
            videos[side].append(encoded(frames, Setting(short_side=side)))

    def resized_by_decoder(side: int, number: int) -> torch.Tensor:
        video = videos[side][number % len(raw)]
        height, width = fitted_size(WIDTH, HEIGHT, side)[::-1]
        top, left, rows, columns = training_box(CLIP, height, width, key_for(number))
        down, across = CLIP.size / rows, CLIP.size / columns
        whole = {"height": round(height * down), "width": round(width * across)}
        reader = decord.VideoReader(io.BytesIO(video), ctx=decord.cpu(0), num_threads=1, **whole)
        indices, _ = frame_indices(CLIP, len(reader), 7.5, moment=(number * 0.618) % 1)
        frames = reader.get_batch(indices.tolist()).asnumpy()
        top, left = min(round(top * down), whole["height"] - CLIP.size), min(round(left * across), whole["width"] - 224)
        return torch.from_numpy(np.ascontiguousarray(frames[:, top : top + CLIP.size, left : left + CLIP.size]))

    print("\nresizing in the decoder, as a ratio to decoding, cropping and then resizing:")
    for side in sides:
        ways: dict[str, Callable[[int], object]] = {
            "ours": lambda number, side=side: clip_of(videos[side][number % len(raw)], 7.5, number),
            "decoder": lambda number, side=side: resized_by_decoder(side, number),
        }
        seconds = in_turns(ways, rounds)
        print(f"{f'short side {side}':30s}{seconds['ours'] / seconds['decoder']:8.2f}")


def clips_per_second(shards: ShardSet, workers: int, prefetched: int, batches: int, step_s: float) -> float:
    """Returns how many clips a consumer gets that computes `step_s` on each batch of 4, once the first has come."""
    loader.PREFETCHED_BATCHES = prefetched
    clips = TrainingClips(shards, DataConfig(clip=CLIP, workers=workers, lanes=1, global_batch=4), seed=0)
    order = Order(shards.samples_per_shard, seed=0, lanes=1, shards_per_window=1, global_batch=4)
    taken: Iterator = training_batches(clips, MicroBatches(order, range(batches + 1), 4, world=1, rank=0))
    next(taken)
    started = time.perf_counter()
    for _ in taken:
        time.sleep(step_s)
    return 4 * batches / (time.perf_counter() - started)


def compare_loading(shards: ShardSet, batches: int) -> None:
    """Prints what workers and prefetched batches do on the cores of this machine."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: one row tells of it
    cores = len(os.sched_getaffinity(0))
    print(f"\nworkers, on {cores} cores, as ratios to none; the consumer computes nothing:")
    alone = clips_per_second(shards, 0, 4, batches, 0.0)
    for workers in (1, 2, 3):
        print(f"{f'{workers} workers':30s}{clips_per_second(shards, workers, 4, batches, 0.0) / alone:8.2f}")
    step_s = 4 / alone
    print("\nbatches prefetched by each of 2 workers, as ratios to 4; a step takes as long as one worker decodes:")
    speeds = {count: clips_per_second(shards, 2, count, batches, step_s) for count in (4, 1, 2, 8)}
    for count in sorted(speeds):
        print(f"{f'{count} prefetched':30s}{speeds[count] / speeds[4]:8.2f}")


def main() -> None:
    """Prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer clips and rounds: a minute, with more noise")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "raw").mkdir()
        count, rounds = (1, 9) if quick else (3, 30)
        raw = [make_raw_clip(folder / "raw" / f"{number}.mp4", number, HEIGHT, WIDTH) for number in range(count)]
        os.sched_setaffinity(0, {max(cores)})
        compare_storage(raw, rounds)
        compare_resizing(raw, rounds)
        os.sched_setaffinity(0, cores)
        for number in range(count, 4):
            (folder / "raw" / f"{number}.mp4").hardlink_to(raw[number % count])
        pack(PackConfig(source=str(folder / "raw"), out=str(folder / "packed"), fps=7.5, jobs=1))
        compare_loading(ShardSet.open(folder / "packed"), batches=16 if quick else 40)


if __name__ == "__main__":
    main()
