"""What augmentation adds to the CPU time of a training clip: 16 frames of 224 x 224 from packed videos, one core.

The clips are those of VideoMAE's finetuning recipes. The kinds are measured in turns, in CPU time with that of the
decode child. Run with `python -m tests.benchmarks.augmentation`.
"""

import statistics
import tempfile
from pathlib import Path

import torch

from pretrain.data.augmentation import AugmentConfig
from pretrain.data.clips import ClipConfig
from pretrain.data.config import DataConfig
from pretrain.data.pack import PackConfig, pack
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import Request, TrainingClips
from tests.benchmarks.cpu_time import cpu_time_s
from tests.benchmarks.raw_clips import make_raw_clip

VIDEOS, ROUNDS = 3, 40
CLIP = ClipConfig(frames=16, frame_rate=7.5, crop="random_resized", scale=(0.08, 1.0), flip=True)
WORDS = "rand-m7-n4-mstd0.5-inc1"
KINDS = {
    "no augmentation": AugmentConfig(),
    "random erasing": AugmentConfig(erasing=0.25),
    "RandAugment": AugmentConfig(WORDS),
    "both": AugmentConfig(WORDS, erasing=0.25),
}


def main() -> None:
    """Prints milliseconds a clip."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "videos").mkdir()
        for number in range(VIDEOS):
            make_raw_clip(folder / "videos" / f"{number}.mp4", number)
        pack(PackConfig(source=str(folder / "videos"), out=str(folder / "shards"), fps=7.5, short_side=256, jobs=1))
        shards = ShardSet.open(folder / "shards")
        kinds = {kind: TrainingClips(shards, DataConfig(clip=CLIP, augment=one), 0) for kind, one in KINDS.items()}
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(-1, ROUNDS):
            for kind, clips in kinds.items():
                started = cpu_time_s()
                clips[Request(number % VIDEOS, 1, number + 1)]
                if number >= 0:
                    seconds[kind].append(cpu_time_s() - started)
    for kind, taken in seconds.items():
        print(f"{kind:<16} {1000 * statistics.mean(taken):6.1f} ms")


if __name__ == "__main__":
    main()
