"""What each rank reads in each step of a run, clip by clip, told from the shards' indexes without decoding a frame.

Nothing is decided here: the requests are those that the loader's workers get, and the frames and keys come from the
functions that the loader calls.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pretrain.data.balanced import SampleOrder
from pretrain.data.config import DataConfig
from pretrain.data.loader import MicroBatches
from pretrain.data.packed_clips import config_of_grid, grid_of_sample
from pretrain.data.sequence_plan import Packing
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import Request, clip_frames, clip_key


class Reading(NamedTuple):
    """One clip that a rank reads in one step.

    Attributes:
        step: The step, from 1, as in `metrics.jsonl` and `skipped.jsonl`.
        place: Where its sample stands in the global batch, from 0.
        rank: The process that reads it.
        worker: That process's loader worker, None where there are no workers.
        set: The set of a mixture, from 0 in the order of the configuration; 0 without a mixture.
        epoch: The epoch of that set, from 0.
        key: The sample's key.
        repeat: Which of the sample's clips, from 0.
        clip_start: Number of the clip's first stored frame.
        mask_seed: The Philox key of its mask in 32 hexadecimal digits; None in a run without masks.
    """

    step: int
    place: int
    rank: int
    worker: int | None
    set: int
    epoch: int
    key: str
    repeat: int
    clip_start: int
    mask_seed: str | None


def reading_list(
    shards: ShardSet | Sequence[ShardSet],
    config: DataConfig,
    order: SampleOrder,
    steps: range,
    world: int = 1,
    resumed_at: int = 0,
    masked: bool = True,
    packing: Packing | None = None,
) -> Iterator[Reading]:
    """Yields the clips of a run in the order of steps, ranks and micro-batches.

    A sample that cannot be decoded is listed all the same; `skipped.jsonl` tells which had a substitute.

    Args:
        shards: The samples, of one set or of the sets of a mixture.
        config: Clips, repeats, micro-batches and workers; `world * micro_batch` must divide `global_batch`.
        order: The order of the samples.
        steps: The steps, the first of a run being 1.
        world: Processes of the run.
        resumed_at: Steps done when the attempt started, since workers take micro-batches in turn from there on.
        masked: Whether the run draws masks.
        packing: How its clips are packed, of which each has its own number of frames; None where all have one size.

    Raises:
        Refused: The index of a shard is missing or was changed.
    """
    sets = (shards,) if isinstance(shards, ShardSet) else shards
    accumulation = order.global_batch // (world * config.micro_batch)
    for step in steps:
        first_batch = (step - 1 - resumed_at) * accumulation
        for rank in range(world):
            requests_of_rank = MicroBatches(order, range(step - 1, step), config.micro_batch, world, rank)
            for batch, requests in enumerate(requests_of_rank, first_batch):
                worker = batch % config.workers if config.workers else None
                for request in requests:
                    place = order.place(request.set_number, request.position)
                    for repeat in range(config.repeats):
                        read_from = sets[request.set_number]
                        key, clip_start = _clip_of(read_from, config, packing, order.seed, request, repeat)
                        mask_seed = f"{clip_key(order.seed, request, repeat, 'mask'):032x}" if masked else None
                        who = rank, worker, request.set_number
                        yield Reading(step, place, *who, request.epoch, key, repeat, clip_start, mask_seed)


def _clip_of(
    shards: ShardSet, config: DataConfig, packing: Packing | None, seed: int, request: Request, repeat: int
) -> tuple[str, int]:
    """Returns the key of a request's sample and the first stored frame of one of its clips."""
    if packing is not None:
        config = config_of_grid(config, packing, grid_of_sample(shards, request.sample, packing))
    shard, row = shards.locate(request.sample)
    index = shards.shard_index(shard)
    indices, _ = clip_frames(config, seed, request, repeat, index.frames[row], index.frame_rates[row])
    return index.keys[row], int(indices[0])
