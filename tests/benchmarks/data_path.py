"""From files to clips on one core: the field's ways on raw videos against ours on packed ones, as ratios.

All give clips of 16 frames of 224 x 224 at 7.5 frames per second (stride 4 at 30), with VideoMAE's multi-scale crop:

- the field: raw files, decord with one thread, and the transforms of VideoMAE's pretraining data set (PIL crops and
  resizes each frame; then floats, normalised and transposed);
- webdataset: the same files in a tar, read by its plain pipeline, then the same;
- ours: `TrainingClips` over what `tubelet pack --fps 7.5` makes of the same files, with 1, 2 and 4 repeats, collated,
  decoded in a decode child; and once with `data.decode_limit_s` 0, which decodes without;
- the bound: the same decoder over the same frames of the packed videos, from memory, and nothing else; beside it
  decord.

Each is measured in turns on one core, one thread, in CPU time (with that of our decode child), which on one core is the
time that it takes and which neighbours disturb least. Run with `make bench-data`.
"""

import io
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import decord
import numpy as np
import torch
import webdataset
from PIL import Image

from pretrain.data.clips import MULTI_SCALES, ClipConfig, cut, training_box
from pretrain.data.config import DataConfig
from pretrain.data.loader import collate
from pretrain.data.pack import PackConfig, pack
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import Request, TrainingClips, clip_frames, clip_key
from pretrain.data.video import DecoderName, open_video
from tests.benchmarks.cpu_time import cpu_time_s
from tests.benchmarks.raw_clips import make_raw_clip

CLIPS, ROUNDS, WARM_UP = 4, 48, 2
CLIP = ClipConfig(frames=16, frame_rate=7.5)
CONFIG = DataConfig(clip=CLIP)
STRIDE = 4  # of raw videos: 30 / 7.5
WANTED = (
    ("ours, 1 repeat", "the field", 3.5),
    ("ours, 1 repeat", "the bound", 0.8),
    ("ours, 4 repeats", "ours, 1 repeat", 2.5),
)
MEAN = torch.tensor(CLIP.mean)[:, None, None].repeat(CLIP.frames, 1, 1)
STD = torch.tensor(CLIP.std)[:, None, None].repeat(CLIP.frames, 1, 1)


def videomae_clip(source: str | io.BytesIO) -> torch.Tensor:
    """Returns a clip as VideoMAE's pretraining data set makes it: float `(C, T, H, W)`, normalised."""
    video = decord.VideoReader(source, num_threads=1, ctx=decord.cpu(0))
    first = random.randint(0, len(video) - (CLIP.frames - 1) * STRIDE - 1)
    frames = video.get_batch([first + STRIDE * number for number in range(CLIP.frames)]).asnumpy()
    images = [Image.fromarray(frame) for frame in frames]
    width, height = images[0].size
    longest = min(width, height)
    sides = [CLIP.size if abs(int(longest * scale) - CLIP.size) < 3 else int(longest * scale) for scale in MULTI_SCALES]
    pairs = [(rows, columns) for i, rows in enumerate(sides) for j, columns in enumerate(sides) if abs(i - j) <= 1]
    rows, columns = random.choice(pairs)
    left, top = random.randint(0, 4) * ((width - columns) // 4), random.randint(0, 4) * ((height - rows) // 4)
    box = (left, top, left + columns, top + rows)
    cropped = [image.crop(box).resize((CLIP.size, CLIP.size), Image.Resampling.BILINEAR) for image in images]
    stacked = np.concatenate([np.asarray(image) for image in cropped], axis=2)
    pixels = torch.from_numpy(stacked).permute(2, 0, 1).contiguous().float().div(255)
    pixels.sub_(MEAN).div_(STD)
    return pixels.view(CLIP.frames, 3, CLIP.size, CLIP.size).transpose(0, 1)


def webdataset_clips(tar: Path) -> "itertools.chain[torch.Tensor]":
    """Yields clips of the samples of a tar without end, through webdataset's plain pipeline."""

    def epoch() -> webdataset.WebDataset:
        samples = webdataset.WebDataset(str(tar), shardshuffle=False).shuffle(CLIPS)
        return samples.to_tuple("mp4").map_tuple(lambda video: videomae_clip(io.BytesIO(video)))

    return itertools.chain.from_iterable((clip for (clip,) in epoch()) for _ in itertools.count())


def requests() -> list[Request]:
    """Returns what each round reads: every sample equally often, at the moments that positions draw."""
    return [Request(number % CLIPS, number // CLIPS, number) for number in range(WARM_UP + ROUNDS)]


def bound(shards: ShardSet, seed: int, decoder: DecoderName = "auto") -> Callable[[Request], object]:
    """Returns a function that decodes the frames of a request, of samples that lie in memory."""
    samples = [shards.read(number) for number in range(shards.samples)]

    def decode(request: Request) -> np.ndarray:
        sample = samples[request.sample]
        indices, _ = clip_frames(CONFIG, seed, request, 0, sample.frames, sample.frame_rate)
        return open_video(sample.video, decoder).read(indices)

    return decode


def main() -> None:
    """Prints clips per second and ratios, and where ours spends its time."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    random.seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "raw").mkdir()
        raw = [make_raw_clip(folder / "raw" / f"{number}.mp4", number) for number in range(CLIPS)]
        with webdataset.TarWriter(str(folder / "raw.tar")) as tar:
            for path in raw:
                tar.write({"__key__": path.stem, "mp4": path.read_bytes()})
        pack(PackConfig(source=str(folder / "raw"), out=str(folder / "packed"), fps=7.5, jobs=1))
        shards = ShardSet.open(folder / "packed")
        kib = [sum(path.stat().st_size for path in raw) / 1024 / CLIPS]
        kib.append(sum(len(shards.read(number).video) for number in range(CLIPS)) / 1024 / CLIPS)
        print(f"{CLIPS} clips of 10 s, 340 x 256; {kib[0]:.0f} KiB each as downloaded, {kib[1]:.0f} KiB packed")
        compare(raw, folder / "raw.tar", shards)
        profile(shards)


def compare(raw: list[Path], tar: Path, shards: ShardSet) -> None:
    """Prints how many clips each way gives in a second, and the ratios that are wanted."""
    from_tar = webdataset_clips(tar)
    ways: dict[str, Callable[[Request], object]] = {
        "the field": lambda request: videomae_clip(str(raw[request.sample])),
        "webdataset": lambda request: next(from_tar),
        "the bound": bound(shards, seed=0),
        "the bound, decord": bound(shards, seed=0, decoder="decord"),
    }
    for repeats in (1, 2, 4):
        clips = TrainingClips(shards, DataConfig(clip=CLIP, repeats=repeats), seed=0)
        ways[f"ours, {repeats} repeat{'s' * (repeats > 1)}"] = lambda request, clips=clips: collate([clips[request]])
    without_child = TrainingClips(shards, DataConfig(clip=CLIP, decode_limit_s=0), seed=0)
    ways["ours, no child"] = lambda request: collate([without_child[request]])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number, request in enumerate(requests()):
        for name, way in ways.items():
            started = cpu_time_s()
            way(request)
            if number >= WARM_UP:
                seconds[name].append(cpu_time_s() - started)
    speeds = {name: clips_in(name) / statistics.median(durations) for name, durations in seconds.items()}
    print(f"\n{'':18s}{'clips/s':>10s}{'x the field':>14s}{'x webdataset':>14s}{'x the bound':>14s}")
    for name, speed in speeds.items():
        ratios = "".join(f"{speed / speeds[peer]:14.2f}" for peer in ("the field", "webdataset", "the bound"))
        print(f"{name:18s}{speed:10.1f}{ratios}")
    print()
    for name, peer, least in WANTED:
        print(f"{name} is {speeds[name] / speeds[peer]:.2f} times as fast as {peer}; wanted: {least}")


def clips_in(name: str) -> int:
    """Returns how many clips one turn of a way gives."""
    return int(name.split()[1]) if "repeat" in name else 1


def profile(shards: ShardSet) -> None:
    """Prints where the time of one clip goes, stage by stage."""
    seconds: dict[str, list[float]] = {}

    def timed(stage: str, work: Callable):
        started = time.process_time()
        result = work()
        seconds.setdefault(stage, []).append(time.process_time() - started)
        return result

    for request in requests():
        sample = timed("read from the shard", lambda request=request: shards.read(request.sample))
        indices, _ = clip_frames(CONFIG, 0, request, 0, sample.frames, sample.frame_rate)
        reader = timed("open", lambda sample=sample: open_video(sample.video))
        frames = torch.from_numpy(timed("decode, to RGB", lambda reader=reader, indices=indices: reader.read(indices)))
        box = training_box(CLIP, *frames.shape[1:3], clip_key(0, request, 0, "crop"))
        clip = timed("crop and resize", lambda frames=frames, box=box: cut(frames, box, CLIP.size))
        timed("collate", lambda clip=clip: torch.stack([clip]))
    total = sum(statistics.mean(durations) for durations in seconds.values())
    print("\nwhere the time of one of our clips goes:")
    for stage, durations in seconds.items():
        mean = statistics.mean(durations)
        print(f"{stage:22s}{1000 * mean:8.2f} ms{mean / total:8.0%}")


if __name__ == "__main__":
    main()
