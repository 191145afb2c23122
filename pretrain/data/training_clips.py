"""The clips of one sample in training: read, decoded and cut, or those of a substitute where the sample is bad.

All is a pure function of the request and the run's seed: frames, crops, augmentation, masks and substitutes.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from pretrain.data.augmentation import augmented
from pretrain.data.clips import cut, is_mirrored, training_box, training_frames
from pretrain.data.config import DataConfig
from pretrain.data.decode_client import open_video_apart
from pretrain.data.quarantine import read_quarantine
from pretrain.data.randomness import Purpose, raw_words, sample_key
from pretrain.data.shards import Sample, ShardSet
from pretrain.data.video import read_time_windows
from pretrain.errors import BadSample

MaskFunction = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""From the keys of `mask` and `decoder_mask` to the visible and the masked token numbers of one clip."""

Loaded = TypeVar("Loaded")

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
        cut_s: Seconds of cutting and augmenting clips and drawing masks.
        cache_hits: Reads of remote shards that the node's cache served.
        cache_misses: Reads that it had to fetch.
        places: Places of packed sequences for the encoder's tokens.
        tokens: Those that hold one.
    """

    read_s: float = 0.0
    decode_s: float = 0.0
    cut_s: float = 0.0
    cache_hits: int = 0
    cache_misses: int = 0
    places: int = 0
    tokens: int = 0


class LoadedSample(NamedTuple):
    """What comes of a request: R clips, each `(T, H, W, C)` uint8, and what `Batch` tells of them.

    The label is 1 for each class of the sample and 0 for the others in a multi-label set.
    """

    clips: list[torch.Tensor]
    label: int | list[float]
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
    return training_frames(config.clip, frames, frame_rate, key)


def label_of(shards: ShardSet, number: int) -> int | list[float]:
    """Returns the class number of a sample, -1 without one; in a multi-label set a number for each class, 1 or 0."""
    label = shards.label(number)
    if isinstance(label, tuple):
        return [float(one in label) for one in range(len(shards.classes))]
    return -1 if label is None else label


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
        return self.first_good(request, self._load)

    def first_good(self, request: Request, load: "Load[Loaded]") -> Loaded | LostSample:
        """Returns what `load` makes of a request's sample, or of the first of its substitutes that is good.

        Args:
            request: What is read.
            load: From a sample's number, the request, the reports so far and a meter; raises `BadSample`.
        """
        skipped: list[dict] = []
        shards = self.sets[request.set_number]
        meter = Meter(shards)
        tried = 0
        for sample in self._candidates(request):
            if tried > SUBSTITUTES:
                break
            report = {"set": request.set_number, "epoch": request.epoch, "position": request.position}
            if (request.set_number, shards.key(sample)) in self.quarantine:
                skipped.append({"key": shards.key(sample), "reason": QUARANTINED, **report, "quarantined": True})
                continue
            try:
                return load(sample, request, skipped, meter)
            except BadSample as error:
                skipped.append({"key": shards.key(sample), "reason": str(error), **report})
                tried += 1
        return LostSample(skipped)

    def _candidates(self, request: Request) -> Iterator[int]:
        yield request.sample
        key = clip_key(self.seed, request, 0, "substitute")
        yield from (raw_words(key, DRAWS) % np.uint64(self.sets[request.set_number].samples)).tolist()

    def _load(self, number: int, request: Request, skipped: list[dict], meter: "Meter") -> LoadedSample:
        sample, shown, padded = self.decoded(number, request, self.config, meter)
        with meter.timing("cut_s"):
            clips = [self._cut(frames, request, repeat) for repeat, frames in enumerate(shown)]
            visible, masked = self._masks(request)
        label = label_of(self.sets[request.set_number], number)
        return LoadedSample(clips, label, visible, masked, sample.key, padded, skipped, meter.costs())

    def decoded(
        self, number: int, request: Request, config: DataConfig, meter: "Meter"
    ) -> tuple[Sample, list[torch.Tensor], bool]:
        """Reads and decodes a sample.

        Args:
            number: The sample, which may be a substitute.
            request: What is read.
            config: Frames and repeats.
            meter: Takes the time.

        Returns:
            The sample; the frames of each of its R clips, `(T, H, W, C)` uint8; and whether it was too short for them.

        Raises:
            BadSample: It cannot be decoded.
        """
        with meter.timing("read_s"):
            sample = self.sets[request.set_number].read(number)
        windows = [
            clip_frames(config, self.seed, request, repeat, sample.frames, sample.frame_rate)
            for repeat in range(config.repeats)
        ]
        with meter.timing("decode_s"):
            reader = open_video_apart(sample.video, config.decoder, config.decode_limit_s)
            shown = read_time_windows(reader, [indices for indices, _ in windows])
        return sample, [torch.from_numpy(frames) for frames in shown], any(is_padded for _, is_padded in windows)

    def _cut(self, frames: torch.Tensor, request: Request, repeat: int) -> torch.Tensor:
        clip = self.config.clip
        height, width = frames.shape[1:3]
        box = training_box(clip, height, width, clip_key(self.seed, request, repeat, "crop"))
        shown = cut(frames, box, clip.size, is_mirrored(clip, clip_key(self.seed, request, repeat, "flip")))
        key = clip_key(self.seed, request, repeat, "augment")
        return augmented(self.config.augment, shown, key, clip.mean, clip.std)

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


class Meter:
    """Sums up what one request costs."""

    def __init__(self, shards: ShardSet) -> None:
        """Starts at nothing."""
        self.shards = shards
        self.seconds: dict[str, float] = {}
        self.cache_before = self._cache()

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Adds the time inside to the seconds of this name in `Costs`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def costs(self) -> Costs:
        """Returns what was summed up."""
        hits, misses = (now - before for now, before in zip(self._cache(), self.cache_before, strict=True))
        read_s, decode_s, cut_s = (self.seconds.get(name, 0.0) for name in ("read_s", "decode_s", "cut_s"))
        return Costs(read_s, decode_s, cut_s, hits, misses)

    def _cache(self) -> tuple[int, int]:
        return self.shards.cache_hits, self.shards.cache_misses


Load = Callable[[int, Request, list[dict], Meter], Loaded]
