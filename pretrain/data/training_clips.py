"""The clips of one sample in training: read, decoded and cut, or those of a substitute where the sample is bad.

All is a pure function of the request and the run's seed: which frames, crops and masks, and which substitute.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from pretrain.data.clips import cut, frame_indices, is_mirrored, training_box
from pretrain.data.config import DataConfig
from pretrain.data.decode_client import open_video_apart
from pretrain.data.quarantine import read_quarantine
from pretrain.data.randomness import Purpose, raw_words, sample_key, uniform
from pretrain.data.shards import ShardSet
from pretrain.data.video import read_time_windows
from pretrain.errors import BadSample

MaskFunction = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""From the keys of `mask` and `decoder_mask` to the visible and the masked token numbers of one clip."""

SUBSTITUTES = 10  # tried in place of a bad sample; the run stops when all of them are bad too
DRAWS = 1000  # for substitutes, of which those in quarantine are not tried
QUARANTINED = "is in data.quarantine"


class Request(NamedTuple):
    """One sample to read: its number, and the (set, epoch, position) that all its random draws follow from."""

    sample: int
    epoch: int
    position: int
    set_number: int = 0


class Costs(NamedTuple):
    """What loading samples took, with those that were passed over on the way.

    Attributes:
        read_s: Seconds of reading from shards.
        decode_s: Seconds of decoding.
        cut_s: Seconds of cutting clips and drawing masks.
        cache_hits: Reads of remote shards that the node's cache served.
        cache_misses: Reads that it had to fetch.
    """

    read_s: float = 0.0
    decode_s: float = 0.0
    cut_s: float = 0.0
    cache_hits: int = 0
    cache_misses: int = 0


class LoadedSample(NamedTuple):
    """What comes of a request: R clips, each `(T, H, W, C)` uint8, and what `Batch` tells of them."""

    clips: list[torch.Tensor]
    label: int
    visible: np.ndarray
    masked: np.ndarray
    key: str
    padded: bool
    skipped: list[dict]
    costs: Costs


class LostSample(NamedTuple):
    """What comes of a request whose sample and all substitutes are bad: their reports."""

    skipped: list[dict]


def clip_key(seed: int, request: Request, repeat: int, purpose: Purpose) -> int:
    """Returns the key of one purpose of a training clip, which a substitute for its sample shares."""
    return sample_key(seed, request.set_number, request.epoch, request.position, repeat, purpose)


def clip_frames(
    config: DataConfig, seed: int, request: Request, repeat: int, frames: int, frame_rate: float
) -> tuple[np.ndarray, bool]:
    """Chooses the stored frames of a training clip.

    Args:
        config: The clip, and whether its sample's repeats share a time window.
        seed: The run's seed.
        request: What is read.
        repeat: Which of the sample's clips.
        frames: Frames in the sample, as its shard's index says.
        frame_rate: Its stored frames per second.

    Returns:
        As `frame_indices`.
    """
    key = clip_key(seed, request, repeat if config.time_windows == "own" else 0, "time")
    return frame_indices(config.clip, frames, frame_rate, uniform(key)[0])


class TrainingClips(Dataset):
    """Cuts the clips of one request; a pure function of the request.

    Args:
        shards: The samples, of one set or of the sets of a mixture.
        config: Clips and repeats.
        seed: The run's seed.
        draw_mask: Draws the mask of a clip from its keys; None where the model takes all tokens.
    """

    def __init__(
        self,
        shards: ShardSet | Sequence[ShardSet],
        config: DataConfig,
        seed: int,
        draw_mask: MaskFunction | None = None,
    ) -> None:
        """Keeps the arguments and reads the list of quarantined samples; opens nothing else."""
        self.sets = (shards,) if isinstance(shards, ShardSet) else tuple(shards)
        self.config = config
        self.seed = seed
        self.draw_mask = draw_mask
        self.quarantine = read_quarantine(config.quarantine)

    def __getitem__(self, request: Request) -> LoadedSample | LostSample:
        """Returns the R clips of a request, from a substitute where its sample is bad."""
        skipped: list[dict] = []
        shards = self.sets[request.set_number]
        meter = _Meter(shards)
        tried = 0
        for sample in self._candidates(request):
            if tried > SUBSTITUTES:
                break
            report = {"set": request.set_number, "epoch": request.epoch, "position": request.position}
            if (request.set_number, shards.key(sample)) in self.quarantine:
                skipped.append({"key": shards.key(sample), "reason": QUARANTINED, **report, "quarantined": True})
                continue
            try:
                return self._load(sample, request, skipped, meter)
            except BadSample as error:
                skipped.append({"key": shards.key(sample), "reason": str(error), **report})
                tried += 1
        return LostSample(skipped)

    def _candidates(self, request: Request) -> Iterator[int]:
        yield request.sample
        key = clip_key(self.seed, request, 0, "substitute")
        yield from (raw_words(key, DRAWS) % np.uint64(self.sets[request.set_number].samples)).tolist()

    def _load(self, number: int, request: Request, skipped: list[dict], meter: "_Meter") -> LoadedSample:
        repeats = range(self.config.repeats)
        with meter.timing("read_s"):
            sample = self.sets[request.set_number].read(number)
        windows = [
            clip_frames(self.config, self.seed, request, repeat, sample.frames, sample.frame_rate) for repeat in repeats
        ]
        time_windows = [indices for indices, _ in windows]
        with meter.timing("decode_s"):
            reader = open_video_apart(sample.video, self.config.decoder, self.config.decode_limit_s)
            shown = [torch.from_numpy(frames) for frames in read_time_windows(reader, time_windows)]
        with meter.timing("cut_s"):
            clips = [self._cut(shown[repeat], request, repeat) for repeat in repeats]
            visible, masked = self._masks(request)
        label = -1 if sample.label is None else sample.label
        padded = any(is_padded for _, is_padded in windows)
        return LoadedSample(clips, label, visible, masked, sample.key, padded, skipped, meter.costs())

    def _cut(self, frames: torch.Tensor, request: Request, repeat: int) -> torch.Tensor:
        clip = self.config.clip
        height, width = frames.shape[1:3]
        box = training_box(clip, height, width, clip_key(self.seed, request, repeat, "crop"))
        return cut(frames, box, clip.size, is_mirrored(clip, clip_key(self.seed, request, repeat, "flip")))

    def _masks(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
        if self.draw_mask is None:
            none = np.empty((self.config.repeats, 0), dtype=np.int64)
            return none, none
        drawn = [
            self.draw_mask(
                clip_key(self.seed, request, repeat, "mask"), clip_key(self.seed, request, repeat, "decoder_mask")
            )
            for repeat in range(self.config.repeats)
        ]
        visible, masked = (np.stack(part) for part in zip(*drawn, strict=True))
        return visible, masked


class _Meter:
    """Sums up what one request costs."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self.seconds: dict[str, float] = {}
        self.cache_before = self._cache()

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def costs(self) -> Costs:
        hits, misses = (now - before for now, before in zip(self._cache(), self.cache_before, strict=True))
        return Costs(**self.seconds, cache_hits=hits, cache_misses=misses)

    def _cache(self) -> tuple[int, int]:
        return self.shards.cache_hits, self.shards.cache_misses
