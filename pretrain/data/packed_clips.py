"""Batches of packed clips: clips of any size cut into tubelets, several of them in each sequence of fixed length.

The sibling of `training_clips.py` and `loader.py` for NaViT's packing; what a sequence holds was planned from the
shards' indexes (`sequence_plan.py`), so that no count depends on decoding: a substitute for a bad sample is cut to the
plan of the sample that it replaces. Workers hand over only the tubelets that the model reads.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from pretrain.data.augmentation import augmented
from pretrain.data.clips import cut, is_mirrored
from pretrain.data.config import DataConfig
from pretrain.data.loader import MicroBatches, load_batches, no_substitute
from pretrain.data.packed_sequences import ClipTokens, fill_sequences, shaped_box, tokens_of
from pretrain.data.prefetch import prefetched
from pretrain.data.sequence_plan import ClipGrid, Packing, SequencePlan
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import Costs, LostSample, Meter, Request, TrainingClips, clip_key
from pretrain.errors import Refused


class PackedRequest(NamedTuple):
    """The samples of one sequence (of R sequences, with R repeats).

    Attributes:
        requests: The samples.
        plan: What the sequence holds of each.
        decoded_in_step: Decoded tokens that this rank has in the whole step.
    """

    requests: tuple[Request, ...]
    plan: SequencePlan
    decoded_in_step: int


class PackedBatch(NamedTuple):
    """A micro-batch of packed sequences, S of them with g clips each, and what `Batch` tells of its samples.

    Attributes:
        tubelets: As the following, see `Sequences`.
        labels: `(S, g)` class numbers, -1 where a sample has none.
        decoded_in_step: `()` decoded tokens that this rank has in the whole step.
        keys: The samples' keys.
        padded: Samples too short for one tubelet's frames; images do not count.
        skipped: Reports of samples that were passed over.
        costs: Sums over the samples, and the places and tokens of the sequences.
    """

    tubelets: torch.Tensor
    coordinates: torch.Tensor
    segments: torch.Tensor
    decoded_tubelets: torch.Tensor
    decoded_coordinates: torch.Tensor
    decoded_segments: torch.Tensor
    labels: torch.Tensor
    decoded_in_step: torch.Tensor
    keys: list[str]
    padded: int
    skipped: list[dict]
    costs: Costs


class PackedSample(NamedTuple):
    """What comes of one request: the tokens of its R clips, and what `PackedBatch` tells of them."""

    clips: list[ClipTokens]
    label: int
    key: str
    padded: bool
    skipped: list[dict]
    costs: Costs


class PackedGroup(NamedTuple):
    """What comes of a packed request."""

    samples: list[PackedSample]
    decoded_in_step: int


class PackedTrainingClips(TrainingClips):
    """Cuts the clips of a packed request; a pure function of it.

    Args:
        shards: The samples, of one set or of the sets of a mixture.
        config: Clips and repeats.
        seed: The run's seed.
        packing: How clips are sized, masked and packed.

    Raises:
        Refused: The set's index does not tell the sizes of videos.
    """

    def __init__(self, shards: ShardSet | Sequence[ShardSet], config: DataConfig, seed: int, packing: Packing) -> None:
        """Keeps the arguments and looks into the first index of each set."""
        super().__init__(shards, config, seed)
        self.packing = packing
        for one in self.sets:
            grid_of_sample(one, 0, packing)

    def planned(self, requests: Sequence[Request]) -> SequencePlan:
        """Plans the sequence of a group of samples from their shards' indexes."""
        return self.packing.plan(
            [grid_of_sample(self.sets[one.set_number], one.sample, self.packing) for one in requests]
        )

    def __getitem__(self, packed: PackedRequest) -> PackedGroup | LostSample:  # type: ignore[override]
        """Returns the clips of a sequence, from substitutes where samples are bad."""
        samples: list[PackedSample] = []
        for number, request in enumerate(packed.requests):
            loaded = self.first_good(request, functools.partial(self._load_packed, packed.plan, number))
            if isinstance(loaded, LostSample):
                return LostSample([report for one in samples for report in one.skipped] + loaded.skipped)
            samples.append(loaded)
        return PackedGroup(samples, packed.decoded_in_step)

    def _load_packed(
        self,
        plan: SequencePlan,
        clip_number: int,
        sample_number: int,
        request: Request,
        skipped: list[dict],
        meter: Meter,
    ) -> PackedSample:
        grid, kept = plan.grids[clip_number], plan.kept[clip_number]
        config = config_of_grid(self.config, self.packing, grid)
        sample, shown, padded = self.decoded(sample_number, request, config, meter)
        with meter.timing("cut_s"):
            clips = [self._tokens(frames, grid, kept, request, repeat) for repeat, frames in enumerate(shown)]
        label = -1 if sample.label is None else sample.label
        return PackedSample(clips, label, sample.key, padded and sample.frames > 1, skipped, meter.costs())

    def _tokens(self, frames: torch.Tensor, grid: ClipGrid, kept: int, request: Request, repeat: int) -> ClipTokens:
        config, sizing = self.config.clip, self.packing.sizing
        key = functools.partial(clip_key, self.seed, request, repeat)
        shape = sizing.pixels(grid)
        box = shaped_box(config, frames.shape[1:3], shape, key("crop"))
        clip = cut(frames, box, shape, is_mirrored(config, key("flip")))
        clip = augmented(self.config.augment, clip, key("augment"), config.mean, config.std)
        return tokens_of(clip, grid, kept, self.packing, key("drop"), key("mask"), key("decoder_mask"))


def config_of_grid(config: DataConfig, packing: Packing, grid: ClipGrid) -> DataConfig:
    """Returns the configuration with the frames that a clip of this grid has."""
    return dataclasses.replace(config, clip=dataclasses.replace(config.clip, frames=packing.sizing.frames(grid)))


def grid_of_sample(shards: ShardSet, number: int, packing: Packing) -> ClipGrid:
    """Returns the grid of a sample's clips, from its shard's index alone.

    Raises:
        Refused: The index does not tell the size of the video.
    """
    shard, row = shards.locate(number)
    index = shards.shard_index(shard)
    where = shards.folder / shards.shards[shard].index_name
    if index.heights is None or index.widths is None:
        raise Refused(
            f"data.packing: {where} was written before indexes told the sizes of videos, which packing plans with; "
            f"make the set again"
        )
    height, width = index.heights[row], index.widths[row]
    if min(height, width) < 1:
        raise Refused(
            f"data.packing: {where} tells of {height} x {width} pixels for {index.keys[row]}; make the set again"
        )
    return packing.sizing.grid(index.frames[row], index.frame_rates[row], height, width)


def collate_packed(packing: Packing, groups: Sequence[PackedGroup]) -> PackedBatch:
    """Puts loaded groups together: the sequences of a group's repeats stand side by side."""
    samples = [one for group in groups for one in group.samples]
    repeats = range(len(samples[0].clips))
    sequences = fill_sequences(
        [[one.clips[repeat] for one in group.samples] for group in groups for repeat in repeats], packing
    )
    costs = Costs(*map(sum, zip(*(one.costs for one in samples), strict=True)))
    return PackedBatch(
        *sequences,
        labels=torch.tensor([[one.label for one in group.samples] for group in groups for _ in repeats]),
        decoded_in_step=torch.tensor(groups[0].decoded_in_step),
        keys=[one.key for one in samples],
        padded=sum(one.padded for one in samples),
        skipped=[report for one in samples for report in one.skipped],
        costs=costs._replace(places=sequences.segments.numel(), tokens=int((sequences.segments >= 0).sum())),
    )


def packed_batches(
    clips: PackedTrainingClips, requests: MicroBatches, pin_memory: bool = False
) -> Iterator[PackedBatch]:
    """Yields the rank's packed micro-batches; see `loader.training_batches`."""
    with prefetched(clips.sets, requests) as followed:
        planned = plan_requests(clips, followed, requests.accumulation)
        collate = functools.partial(_collate_unless_lost, clips.packing)
        for batch in load_batches(clips, planned, clips.config.workers, collate, pin_memory):
            if isinstance(batch, LostSample):
                raise no_substitute(clips, batch)
            yield batch


def plan_requests(
    clips: PackedTrainingClips, micro_batches: Iterable[list[Request]], accumulation: int
) -> Iterator[list[PackedRequest]]:
    """Groups and plans a rank's requests, step by step.

    Args:
        clips: Plans a group.
        micro_batches: The requests of each micro-batch.
        accumulation: Micro-batches of one step.

    Yields:
        The packed requests of each micro-batch.
    """
    group = clips.packing.group
    step: list[list[tuple[tuple[Request, ...], SequencePlan]]] = []
    for requests in micro_batches:
        groups = [tuple(requests[start : start + group]) for start in range(0, len(requests), group)]
        step.append([(one, clips.planned(one)) for one in groups])
        if len(step) < accumulation:
            continue
        decoded = sum(sum(plan.decoded) for planned in step for _, plan in planned) * clips.config.repeats
        for planned in step:
            yield [PackedRequest(one, plan, decoded) for one, plan in planned]
        step = []


def _collate_unless_lost(packing: Packing, loaded: list[PackedGroup | LostSample]) -> PackedBatch | LostSample:
    lost = [report for one in loaded if isinstance(one, LostSample) for report in one.skipped]
    if lost:
        return LostSample(lost)
    return collate_packed(packing, [one for one in loaded if isinstance(one, PackedGroup)])
