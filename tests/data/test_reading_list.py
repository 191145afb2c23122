"""The list of what each rank reads is what the loader yields: keys, places, workers, first frames, masks."""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from pretrain.data.clips import ClipConfig
from pretrain.data.config import DataConfig
from pretrain.data.loader import Batch, MicroBatches, training_batches
from pretrain.data.order import Order
from pretrain.data.reading_list import reading_list
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import Request, TrainingClips
from pretrain.data.video import open_video
from pretrain.errors import Refused
from pretrain.model.masking import MaskConfig, draw_mask
from pretrain.model.tubelets import Grid

# Whole frames, so that a clip tells where it starts: the packed square stands elsewhere in each.
CLIP = ClipConfig(frames=4, frame_rate=6.0, size=48, crop="center")
CONFIG = DataConfig(clip=CLIP, repeats=2, global_batch=6, micro_batch=2, lanes=2, shards_per_window=2, workers=2)
SEED = 5
MASK = functools.partial(draw_mask, MaskConfig(ratio=0.75), Grid(2, 6, 6))


class SignedClips(TrainingClips):
    """Clips whose keys tell which worker cut them."""

    def __getitem__(self, request: Request):
        loaded = super().__getitem__(request)
        worker = get_worker_info()
        return loaded._replace(key=f"{loaded.key} {worker.id if worker else None}")


@pytest.fixture(scope="module")
def shards(packed_shards) -> ShardSet:
    return ShardSet.open(packed_shards)


@pytest.fixture(scope="module")
def frames_of(shards) -> dict[str, torch.Tensor]:
    """All frames of each sample, cropped like a clip."""
    samples = [shards.read(number) for number in range(len(shards))]
    return {
        sample.key: torch.from_numpy(open_video(sample.video).read(np.arange(sample.frames)))[:, :, 8:56]
        for sample in samples
    }


def order_of(shards: ShardSet, config: DataConfig) -> Order:
    return Order(shards.samples_per_shard, SEED, config.lanes, config.shards_per_window, config.global_batch)


def yielded(
    shards: ShardSet, config: DataConfig, attempt: range, world: int, rank: int
) -> Iterator[tuple[int, list[Request], Batch]]:
    """Yields what an attempt over some steps reads, with the step's number in the metrics."""
    requests = MicroBatches(order_of(shards, config), attempt, config.micro_batch, world, rank)
    batches = training_batches(SignedClips(shards, config, SEED, MASK), requests)
    accumulation = len(requests) // len(attempt)
    for number, (asked, batch) in enumerate(zip(requests, batches, strict=True)):
        yield attempt[number // accumulation] + 1, asked, batch


@pytest.mark.parametrize(
    ("world", "workers", "first_step", "time_windows"), [(1, 2, 1, "shared"), (3, 0, 0, "shared"), (1, 0, 0, "own")]
)
def test_the_list_tells_what_the_loader_yields(shards, frames_of, world, workers, first_step, time_windows):
    config = dataclasses.replace(CONFIG, workers=workers, time_windows=time_windows)
    order = order_of(shards, config)
    steps = range(first_step + 1, 5)
    listed = iter(list(reading_list(shards, config, order, steps, world, resumed_at=first_step)))
    by_rank = [list(yielded(shards, config, range(first_step, 4), world, rank)) for rank in range(world)]
    in_order = sorted(
        ((step, rank, asked, batch) for rank in range(world) for step, asked, batch in by_rank[rank]),
        key=lambda one: one[:2],
    )
    seen_starts = set()
    for step, rank, asked, batch in in_order:
        clips = iter(zip(batch.clips, batch.visible, strict=True))
        for request, signed in zip(asked, batch.keys, strict=True):
            for repeat, (clip, visible) in zip(range(config.repeats), clips, strict=False):
                reading = next(listed)
                assert (reading.step, reading.rank, reading.repeat) == (step, rank, repeat)
                assert (reading.epoch, reading.place) == (step - 1, request.position)
                assert f"{reading.key} {reading.worker}" == signed
                first = reading.clip_start
                assert torch.equal(clip, frames_of[reading.key][first : first + 7 : 2])
                assert not torch.equal(clip[0], frames_of[reading.key][first - 1])
                assert visible.tolist() == MASK(int(reading.mask_seed, 16), 0)[0].tolist()
                seen_starts.add(first)
    assert next(listed, None) is None
    assert len(seen_starts) > 5


def test_clips_start_where_the_index_says_that_there_is_room(shards):
    """The loader and the list rest on the index; a decoder that counted otherwise would not move a clip."""
    order = order_of(shards, CONFIG)
    frames = {shards.key(number): shards.read(number).frames for number in range(len(shards))}
    for reading in reading_list(shards, CONFIG, order, range(1, 40)):
        assert 0 <= reading.clip_start <= frames[reading.key] - 7


def test_a_run_without_masks_and_workers_lists_none(shards):
    config = dataclasses.replace(CONFIG, workers=0)
    listed = list(reading_list(shards, config, order_of(shards, config), range(2, 3), masked=False))
    assert {(reading.worker, reading.mask_seed) for reading in listed} == {(None, None)}
    masked = reading_list(shards, config, order_of(shards, config), range(2, 3))
    assert [reading._replace(mask_seed=None) for reading in masked] == listed


def test_a_world_that_does_not_divide_the_batch_is_refused(shards):
    with pytest.raises(Refused, match=r"data\.global_batch: 6 samples do not divide among 4 processes; use 8"):
        list(reading_list(shards, CONFIG, order_of(shards, CONFIG), range(1, 2), world=4))
