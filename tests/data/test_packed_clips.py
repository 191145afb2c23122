"""Packed batches from real shards: planned without decoding, cut to the plan whatever fails to decode."""

import dataclasses
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.clips import ClipConfig
from pretrain.data.config import DataConfig
from pretrain.data.loader import MicroBatches
from pretrain.data.order import Order
from pretrain.data.packed_clips import (
    PackedBatch,
    PackedTrainingClips,
    collate_packed,
    grid_of_sample,
    packed_batches,
    plan_requests,
)
from pretrain.data.packed_sequences import shaped_box, tokens_of
from pretrain.data.packed_views import PackedEvaluationViews
from pretrain.data.sequence_plan import NO_MASKS, ClipGrid, ClipSizing, Packing, PackingConfig
from pretrain.data.shards import ShardSet
from pretrain.data.video import open_video
from pretrain.errors import Refused
from pretrain.model.masking import MaskConfig
from pretrain.packing import packing_of

CLIP = ClipConfig(frames=8, stride=1, size=32)
TUBELET = (2, 8, 8)
CONFIG = DataConfig(clip=CLIP, global_batch=8, micro_batch=4, lanes=2, shards_per_window=2, workers=0)
MASK = MaskConfig(name="random", ratio=0.5, decoded=0.5)


def config_of(tokens: int = 32, **fields) -> DataConfig:
    return dataclasses.replace(CONFIG, packing=PackingConfig(group=2, tokens=tokens), **fields)


def order_of(shards: ShardSet) -> Order:
    return Order(shards.samples_per_shard, 3, CONFIG.lanes, CONFIG.shards_per_window, CONFIG.global_batch)


def read(shards: ShardSet, config: DataConfig, world: int = 1, rank: int = 0, steps: int = 3) -> list[PackedBatch]:
    clips = PackedTrainingClips(shards, config, 3, packing_of(config, TUBELET, MASK))
    requests = MicroBatches(order_of(shards), range(steps), config.micro_batch, world, rank)
    return list(packed_batches(clips, requests))


def sequences_of(batches: list[PackedBatch]) -> list[bytes]:
    """Each sequence of some batches, as bytes that compare."""
    tensors = PackedBatch._fields[:7]
    return [
        b"".join(getattr(batch, name)[row].numpy().tobytes() for name in tensors)
        for batch in batches
        for row in range(len(batch.tubelets))
    ]


@pytest.fixture(scope="module")
def shards(sized_shards) -> ShardSet:
    return ShardSet.open(sized_shards)


def test_the_sequences_of_a_step_do_not_depend_on_the_world_or_the_micro_batch(shards):
    batches = read(shards, config_of())
    expected = sequences_of(batches)
    assert len(expected) == 3 * CONFIG.global_batch // 2
    assert len(set(expected)) == len(expected)
    others = [
        sequences_of(read(shards, config_of(micro_batch=micro_batch), world, rank))
        for world, rank, micro_batch in ((2, 0, 2), (2, 1, 2))
    ]
    in_steps = [part for step in range(3) for other in others for part in other[2 * step : 2 * step + 2]]
    assert in_steps == expected


def test_a_batch_tells_the_decoded_tokens_of_its_whole_step_and_what_is_filled(shards):
    batches = read(shards, config_of())
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        found = sum(int((batch.decoded_segments >= 0).sum()) for batch in (first, second))
        assert int(first.decoded_in_step) == int(second.decoded_in_step) == found > 0
    for batch in batches:
        assert batch.costs.places == batch.segments.numel() == 2 * 32
        assert batch.costs.tokens == int((batch.segments >= 0).sum())


def test_repeats_give_sequences_of_the_same_shape_with_other_tokens(shards):
    once, twice = (read(shards, config_of(repeats=repeats), steps=1)[0] for repeats in (1, 2))
    assert len(twice.tubelets) == 2 * len(once.tubelets)
    torch.testing.assert_close(twice.segments[0], twice.segments[1])
    assert not torch.equal(twice.coordinates[0], twice.coordinates[1])
    torch.testing.assert_close(twice.tubelets[::2], once.tubelets)
    assert int(twice.decoded_in_step) == 2 * int(once.decoded_in_step)


def test_planning_decodes_and_reads_nothing_but_indexes(shards, tmp_path):
    folder = Path(shutil.copytree(shards.folder, tmp_path / "empty"))
    for shard in shards.shards:
        (folder / shard.name).write_bytes(bytes(shard.bytes))
    blank = ShardSet.open(folder)
    plans = []
    for opened in (shards, blank):
        clips = PackedTrainingClips(opened, config_of(), 3, packing_of(config_of(), TUBELET, MASK))
        requests = MicroBatches(order_of(opened), range(3), CONFIG.micro_batch, 1, 0)
        plans.append(list(plan_requests(clips, requests, requests.accumulation)))
    assert plans[0] == plans[1]


def test_a_substitute_is_cut_to_the_plan_of_the_sample_that_it_replaces(shards, tmp_path):
    folder = Path(shutil.copytree(shards.folder, tmp_path / "damaged"))
    opened = ShardSet.open(folder)
    for number in (1, 6):
        shard, row = opened.locate(number)
        with open(folder / opened.shards[shard].name, "r+b") as file:
            file.seek(opened.shard_index(shard).video_offsets[row] + 60)
            file.write(b"damage")
    whole, damaged = read(shards, config_of()), read(opened, config_of())
    assert sum(len(batch.skipped) for batch in damaged) >= 2
    for one, other in zip(whole, damaged, strict=True):
        for name in ("coordinates", "segments", "decoded_coordinates", "decoded_segments", "decoded_in_step"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert torch.equal(one.tubelets, other.tubelets) == (not other.skipped)


def test_images_and_short_videos_are_planned_and_are_not_counted_as_padded(shards):
    grids = {grid_of_sample(shards, number, packing_of(config_of(), TUBELET)) for number in range(shards.samples)}
    assert {grid.slots for grid in grids} == {1, 2, 4}
    assert len({(grid.rows, grid.columns) for grid in grids}) >= 4
    assert sum(batch.padded for batch in read(shards, config_of())) == 0


def test_tokens_are_the_pixels_at_their_coordinates():
    clip = torch.arange(4 * 16 * 24 * 3).reshape(4, 16, 24, 3).remainder(251).to(torch.uint8)
    grid = ClipGrid(2, 2, 3)
    tokens = tokens_of(clip, grid, 7, Packing(ClipSizing(CLIP, 2.0, TUBELET), 1, 12), 1, 2, 3)
    assert tokens.tubelets.shape == (7, 2 * 8 * 8 * 3)
    assert len(tokens.decoded_tubelets) == 0
    numbers = [int(np.ravel_multi_index(tuple(where), grid)) for where in tokens.coordinates.tolist()]
    assert numbers == sorted(set(numbers))
    for tubelet, (slot, row, column) in zip(tokens.tubelets, tokens.coordinates.tolist(), strict=True):
        block = clip[2 * slot : 2 * slot + 2, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert torch.equal(tubelet, block.flatten())


@given(
    st.sampled_from(["multi_scale", "random_resized", "center"]),
    st.tuples(st.integers(8, 600), st.integers(8, 600)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(0, 2**60),
)
def test_a_crop_lies_in_the_frame_and_has_the_clip_s_aspect_ratio(crop, frame, parts, key):
    shape = (16 * parts[0], 16 * parts[1])
    top, left, height, width = shaped_box(dataclasses.replace(CLIP, crop=crop), frame, shape, key)
    assert min(top, left) >= 0
    assert min(height, width) >= 1
    assert top + height <= frame[0]
    assert left + width <= frame[1]
    scale = height / shape[0]
    assert abs(width - scale * shape[1]) <= 0.5 + 0.5 * shape[1] / shape[0] + 1e-9 or 1 in (height, width)


def test_a_clip_alone_is_the_whole_frame_at_its_own_size(shards):
    packing = packing_of(config_of(), TUBELET)
    views = PackedEvaluationViews(shards, packing, temporal=2)
    for number in range(shards.samples):
        view = views[number, True]
        grid, clips = views.clips(number)
        assert view.error is None
        assert [len(part) for part in view.sequences[:3]] == [2, 2, 2]
        assert int((view.sequences.segments[0] == 0).sum()) == grid.tokens
        sample = shards.read(number)
        height, width = open_video(sample.video).read(np.zeros(1, dtype=int)).shape[1:3]
        assert clips[0].shape[1:3] == packing.sizing.pixels(grid)
        if (height, width) == packing.sizing.pixels(grid):
            stored = open_video(sample.video).read(np.zeros(1, dtype=int))[0]
            assert np.array_equal(clips[0][0].numpy(), stored)


def without_sizes(shards: ShardSet, folder: Path) -> ShardSet:
    """Copies a set as it was when indexes did not tell the sizes of videos."""
    shutil.copytree(shards.folder, folder)
    content = json.loads((folder / "index.json").read_text())
    for entry in content["shards"]:
        path = (folder / entry["name"]).with_suffix(".idx")
        columns = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("heights", "widths")}
        path.write_text(json.dumps(columns))
        entry["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(content))
    return ShardSet.open(folder)


def test_an_index_that_does_not_tell_sizes_is_refused_with_the_remedy(shards, tmp_path):
    old = without_sizes(shards, tmp_path / "old")
    packing = packing_of(config_of(), TUBELET)
    for make in (
        lambda: PackedTrainingClips(old, config_of(), 0, packing),
        lambda: PackedEvaluationViews(old, packing),
    ):
        with pytest.raises(Refused, match=r"data.packing: .*shard-000000.idx was written before .* make the set again"):
            make()


def test_workers_get_all_that_they_need_and_give_what_this_process_does(shards):
    config = config_of()
    clips = PackedTrainingClips(shards, config, 3, packing_of(config, TUBELET, MASK))
    requests = MicroBatches(order_of(shards), range(1), config.micro_batch, 1, 0)
    for planned in plan_requests(clips, requests, requests.accumulation):
        there, asked = pickle.loads(pickle.dumps((clips, planned)))
        ours, theirs = (collate_packed(one.packing, [one[group] for group in asked]) for one in (clips, there))
        assert sequences_of([ours]) == sequences_of([pickle.loads(pickle.dumps(theirs))])


def test_a_model_that_sees_all_tokens_gets_all_that_fit(shards):
    config = config_of(tokens=40)
    clips = PackedTrainingClips(shards, config, 3, packing_of(config, TUBELET))
    assert clips.packing.masks is NO_MASKS
    requests = MicroBatches(order_of(shards), range(1), config.micro_batch, 1, 0)
    for batch in packed_batches(clips, requests):
        assert batch.decoded_tubelets.shape[1] == 0
        assert all(set(segments.tolist()) - {-1} == {0, 1} for segments in batch.segments)
