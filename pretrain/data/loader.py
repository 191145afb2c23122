"""Batches of clips from shards: worker processes without any state of their own.

A worker is told what to read (a `Request`, which the order decided) and everything random about it follows from keys;
so workers may be added, removed or killed without changing a single clip. Workers start by forkserver: decoders must
not be inherited across a fork.
"""

import contextlib
import dataclasses
import logging
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.data.balanced import SampleOrder
from pretrain.data.clips import ClipConfig, cut, frame_indices, is_mirrored, training_box
from pretrain.data.decode_client import DECODE_LIMIT_S, open_video_apart, refuse_decode_limit
from pretrain.data.prefetch import prefetched
from pretrain.data.processes import become_worker, fork_server
from pretrain.data.quarantine import read_quarantine
from pretrain.data.randomness import Purpose, raw_words, sample_key, uniform
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.shards import ShardSet
from pretrain.data.video import DecoderName, read_time_windows
from pretrain.errors import BadSample, Refused, StoppedByRule, TubeletError

logger = logging.getLogger(__name__)

MaskFunction = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""From the keys of `mask` and `decoder_mask` to the visible and the masked token numbers of one clip."""

SUBSTITUTES = 10  # tried in place of a bad sample; the run stops when all of them are bad too
PREFETCHED_BATCHES = 4  # for each worker
QUARANTINED = "is in data.quarantine"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the samples are and how they are read."""

    shards: str | None = None
    """Folder of shards, written by `tubelet pack`, or its http://, https:// or s3:// URL."""
    mixture: dict[str, float] | None = None
    """Several folders or URLs of shards in place of one, each with its weight: its share of every step."""
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    """Where shards from URLs are kept."""
    clip: ClipConfig = dataclasses.field(default_factory=ClipConfig)
    """How a clip is cut from a sample."""
    repeats: int = 1
    """Clips cut from each sample, with other crops and masks (repeated augmentation)."""
    time_windows: Literal["shared", "own"] = "shared"
    """Whether the repeats of a sample show the same frames, or each those of a time window of its own."""
    global_batch: int = 256
    """Samples in one optimiser step over all processes."""
    micro_batch: int = 8
    """Samples that one process sends through the model at once; the rest is accumulated."""
    lanes: int = 8
    """Parts of the set that are read side by side; divides global_batch. A multiple of the nodes keeps caches warm."""
    shards_per_window: int = 8
    """Pieces of shards that are shuffled together."""
    class_power: float = 1.0
    """Class balance: a class's share of every step grows with its samples to this power; 1 as stored, 0 all alike."""
    decoder: DecoderName = "auto"
    """Who decodes: decord, pyav, torchcodec, or auto: decord for what packing writes and pyav for all else."""
    decode_limit_s: float | None = DECODE_LIMIT_S
    """Seconds after which a decode is given up as a bad sample; 0 or null decodes without limit or protection."""
    workers: int = 4
    """Loader processes for each training process; 0 loads in the training process."""
    max_bad_share: float = 0.01
    """Stop the run when more than this share of the samples read cannot be decoded; the first ten are forgiven."""
    quarantine: str | None = None
    """Samples that training passes over unread: the skipped.jsonl of a run, or lines like {"key": "..."}."""

    def validate(self) -> None:
        """Raises `Refused` for numbers and files that cannot be; the order checks what must divide."""
        for name in ("repeats", "global_batch", "micro_batch", "lanes", "shards_per_window"):
            if getattr(self, name) < 1:
                raise Refused(f"data.{name}: {getattr(self, name)} must be at least 1")
        if self.mixture is not None and not self.mixture:
            raise Refused("data.mixture: holds no set; give folders of shards with their weights")
        for folder, weight in (self.mixture or {}).items():
            if not 0 < weight < math.inf:
                raise Refused(f"data.mixture: the weight {weight} of {folder} must be finite and greater than 0")
        if not 0 <= self.class_power <= 1:
            raise Refused(f"data.class_power: {self.class_power} must lie between 0 (all alike) and 1 (as stored)")
        if self.class_power < 1 and self.mixture is not None:
            raise Refused(
                f"data.class_power: {self.class_power} balances the classes of one labelled set, and data.mixture "
                f"names several sets; leave it at 1"
            )
        if self.workers < 0:
            raise Refused(f"data.workers: {self.workers} must not be negative")
        if not 0 <= self.max_bad_share <= 1:
            raise Refused(f"data.max_bad_share: {self.max_bad_share} must lie between 0 and 1")
        self.cache.validate()
        refuse_decode_limit("data.decode_limit_s", self.decode_limit_s)
        read_quarantine(self.quarantine)


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


class Batch(NamedTuple):
    """A micro-batch of B samples with R clips each; clips of one sample stand together.

    Attributes:
        clips: `(B * R, T, H, W, C)` uint8.
        labels: `(B * R,)` class numbers, -1 where a sample has none.
        visible: `(B * R, Nv)` token numbers, or `(B * R, 0)` without masks.
        masked: `(B * R, Nm)` token numbers, or `(B * R, 0)` without masks.
        keys: The samples' keys, B of them.
        padded: Samples too short for their time window.
        skipped: Reports of samples that were passed over: key, reason, epoch, position; `quarantined` is true of those
            that were not attempted.
        costs: Sums over the samples.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    visible: torch.Tensor
    masked: torch.Tensor
    keys: list[str]
    padded: int
    skipped: list[dict]
    costs: Costs = Costs()


class _Loaded(NamedTuple):
    clips: list[torch.Tensor]
    label: int
    visible: np.ndarray
    masked: np.ndarray
    key: str
    padded: bool
    skipped: list[dict]
    costs: Costs


class _Lost(NamedTuple):
    """What comes of a request whose sample and all substitutes are bad: their reports."""

    skipped: list[dict]


class NoSubstitute(StoppedByRule):
    """A sample cannot be decoded, nor can any of its substitutes.

    Attributes:
        skipped: Reports like those of a `Batch`, of these samples and of others passed over in the same micro-batch.
    """

    told = False  # the rank that reads the sample meets it alone

    def __init__(self, message: str, skipped: list[dict]) -> None:
        """Takes the sentence for the user and the reports."""
        super().__init__(message)
        self.skipped = skipped


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

    def __getitem__(self, request: Request) -> _Loaded | _Lost:
        """Returns the R clips of a request, from a substitute where its sample is bad."""
        skipped: list[dict] = []
        shards = self.sets[request.set_number]
        meter = _Meter(shards)
        for sample in self._candidates(request):
            report = {"set": request.set_number, "epoch": request.epoch, "position": request.position}
            if (request.set_number, shards.key(sample)) in self.quarantine:
                skipped.append({"key": shards.key(sample), "reason": QUARANTINED, **report, "quarantined": True})
                continue
            try:
                return self._load(sample, request, skipped, meter)
            except BadSample as error:
                skipped.append({"key": shards.key(sample), "reason": str(error), **report})
        return _Lost(skipped)

    def _candidates(self, request: Request) -> Iterator[int]:
        yield request.sample
        key = clip_key(self.seed, request, 0, "substitute")
        yield from (raw_words(key, SUBSTITUTES) % np.uint64(self.sets[request.set_number].samples)).tolist()

    def _load(self, number: int, request: Request, skipped: list[dict], meter: "_Meter") -> _Loaded:
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
        return _Loaded(clips, label, visible, masked, sample.key, padded, skipped, meter.costs())

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


def collate(loaded: Sequence[_Loaded]) -> Batch:
    """Puts loaded samples together, all clips of a sample side by side."""
    repeats = len(loaded[0].clips)
    return Batch(
        clips=torch.stack([clip for one in loaded for clip in one.clips]),
        labels=torch.tensor([one.label for one in loaded]).repeat_interleave(repeats),
        visible=torch.from_numpy(np.concatenate([one.visible for one in loaded])),
        masked=torch.from_numpy(np.concatenate([one.masked for one in loaded])),
        keys=[one.key for one in loaded],
        padded=sum(one.padded for one in loaded),
        skipped=[report for one in loaded for report in one.skipped],
        costs=Costs(*map(sum, zip(*(one.costs for one in loaded), strict=True))),
    )


class MicroBatches:
    """The requests of one rank, micro-batch by micro-batch, from one step of the run to another."""

    def __init__(self, order: SampleOrder, steps: range, micro_batch: int, world: int, rank: int) -> None:
        """Keeps the arguments; `world * micro_batch` must divide the order's global batch."""
        self.order = order
        self.steps = steps
        self.micro_batch = micro_batch
        self.world = world
        self.rank = rank

    def __len__(self) -> int:
        """Micro-batches that this rank reads."""
        return len(self.steps) * (self.order.global_batch // (self.world * self.micro_batch))

    def __iter__(self) -> Iterator[list[Request]]:
        """Yields the requests of one micro-batch after the other."""
        for step in self.steps:
            requests = [
                Request(sample, part.epoch, position, set_number)
                for set_number, part in self.order.parts(step, self.world, self.rank)
                for sample, position in zip(part.samples.tolist(), part.positions.tolist(), strict=True)
            ]
            for start in range(0, len(requests), self.micro_batch):
                yield requests[start : start + self.micro_batch]


def training_batches(clips: TrainingClips, requests: MicroBatches, pin_memory: bool = False) -> Iterator[Batch]:
    """Yields the rank's micro-batches, decoded ahead by worker processes.

    Raises:
        NoSubstitute: A sample and all its substitutes cannot be decoded.
    """
    with prefetched(clips.sets, requests) as followed:
        for batch in load_batches(clips, followed, clips.config.workers, _collate_unless_lost, pin_memory):
            if isinstance(batch, _Lost):
                raise _no_substitute(clips.sets[batch.skipped[-1]["set"]], batch.skipped)
            yield batch


def _collate_unless_lost(loaded: list[_Loaded | _Lost]) -> Batch | _Lost:
    if any(isinstance(one, _Lost) for one in loaded):
        return _Lost([report for one in loaded for report in one.skipped])
    return collate([one for one in loaded if isinstance(one, _Loaded)])


def _no_substitute(shards: ShardSet, skipped: list[dict]) -> NoSubstitute:
    reasons = {report["key"]: report["reason"] for report in skipped}
    for key, reason in reasons.items():
        logger.warning("%s: %s", key, reason)
    return NoSubstitute(
        f"{shards.folder}: a sample and its {SUBSTITUTES} substitutes cannot be decoded; bad are {' '.join(reasons)} "
        f"({skipped[-1]['reason']}); pack the videos anew",
        skipped,
    )


def load_batches(
    dataset: Dataset, requests: Iterable, workers: int, collate_fn: Callable, pin_memory: bool
) -> Iterator[Any]:
    """Yields what a dataset returns for lists of requests, from worker processes or from this one.

    Args:
        dataset: Returns one item for one request.
        requests: Lists of requests, one for each batch.
        workers: Worker processes; 0 loads here.
        collate_fn: Makes a batch of a list of items.
        pin_memory: Whether batches are pinned for copying to a GPU.

    Raises:
        TubeletError: What the dataset raised, in a worker or here.
    """
    parallel: dict[str, Any] = (
        {"multiprocessing_context": fork_server(), "prefetch_factor": PREFETCHED_BATCHES} if workers else {}
    )
    loader = DataLoader(
        dataset,
        batch_sampler=requests,
        num_workers=workers,
        collate_fn=collate_fn,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        **parallel,
    )
    try:
        yield from loader
    except TubeletError as error:
        if not workers:
            raise
        # A worker's error arrives with its traceback in the message; the last line is what the worker said.
        raise type(error)(str(error).strip().splitlines()[-1].split(": ", 1)[-1]) from None


def _start_worker(worker: int) -> None:
    sys.excepthook = _report
    torch.set_num_threads(1)
    trainer = multiprocessing.parent_process()  # torch watches os.getppid(), which here is the fork server
    if trainer is not None:
        become_worker(trainer.sentinel)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Reports what escapes a worker's threads, but for the trainer's leaving in the middle of taking a batch."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
