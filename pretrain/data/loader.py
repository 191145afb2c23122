"""Batches of clips from shards: worker processes without any state of their own.

A worker is told what to read (a `Request`, which the order decided) and everything random about it follows from keys;
so workers may be added, removed or killed without changing a single clip. Workers start by forkserver: decoders must
not be inherited across a fork.
"""

import logging
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.data.balanced import SampleOrder
from pretrain.data.prefetch import prefetched
from pretrain.data.processes import become_worker, fork_server
from pretrain.data.training_clips import DRAWS, SUBSTITUTES, Costs, LoadedSample, LostSample, Request, TrainingClips
from pretrain.errors import StoppedByRule, TubeletError

logger = logging.getLogger(__name__)

PREFETCHED_BATCHES = 4  # for each worker


class Batch(NamedTuple):
    """A micro-batch of B samples with R clips each; clips of one sample stand together.

    Attributes:
        clips: `(B * R, T, H, W, C)` uint8.
        labels: `(B * R,)` class numbers, -1 where a sample has none; `(B * R, K)` of 1 and 0 from a multi-label set.
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


class NoSubstitute(StoppedByRule):
    """A sample cannot be decoded, nor can any of its substitutes."""

    told = False  # the rank that reads the sample meets it alone


def collate(loaded: Sequence[LoadedSample]) -> Batch:
    """Puts loaded samples together, all clips of a sample side by side."""
    repeats = len(loaded[0].clips)
    return Batch(
        clips=torch.stack([clip for one in loaded for clip in one.clips]),
        labels=torch.tensor([one.label for one in loaded]).repeat_interleave(repeats, dim=0),
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

    @property
    def accumulation(self) -> int:
        """Micro-batches of one step."""
        return self.order.global_batch // (self.world * self.micro_batch)

    def __len__(self) -> int:
        """Micro-batches that this rank reads."""
        return len(self.steps) * self.accumulation

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
            if isinstance(batch, LostSample):
                raise no_substitute(clips, batch)
            yield batch


def _collate_unless_lost(loaded: list[LoadedSample | LostSample]) -> Batch | LostSample:
    if any(isinstance(one, LostSample) for one in loaded):
        return LostSample([report for one in loaded for report in one.skipped])
    return collate([one for one in loaded if isinstance(one, LoadedSample)])


def no_substitute(clips: TrainingClips, lost: LostSample) -> NoSubstitute:
    """Returns the error that ends a run, after telling of each bad sample."""
    shards, skipped = clips.sets[lost.skipped[-1]["set"]], lost.skipped
    reasons = {report["key"]: report["reason"] for report in skipped if not report.get("quarantined")}
    if not reasons:
        return NoSubstitute(
            f"data.quarantine: names a sample of {shards.folder} and all of its {DRAWS} substitutes; shorten it"
        )
    for key, reason in reasons.items():
        logger.warning("%s: %s", key, reason)
    return NoSubstitute(
        f"{shards.folder}: a sample and its {SUBSTITUTES} substitutes cannot be decoded; bad are {' '.join(reasons)} "
        f"({list(reasons.values())[-1]}); pack the videos anew"
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
        TubeletError: What the dataset raised, in a worker or here; or a worker died.
    """
    parallel: dict[str, Any] = (
        {"multiprocessing_context": fork_server([__name__]), "prefetch_factor": PREFETCHED_BATCHES} if workers else {}
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
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not workers or not _tells_of_dead_worker(error):
            raise
        raise TubeletError(
            "data.workers: a loader worker died; if it was for want of memory or of shared memory (df /dev/shm), use "
            "fewer workers or a smaller data.micro_batch; the same command goes on from the last checkpoint"
        ) from error


def _tells_of_dead_worker(error: Exception) -> bool:
    """Whether torch found a worker dead, or could not fetch the memory of a batch from it any more."""
    said = re.match(r"DataLoader worker \(pid.*\) (exited unexpectedly|is killed by signal)", str(error))
    return not isinstance(error, RuntimeError) or said is not None


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
