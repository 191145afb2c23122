"""Mixtures of sets: each has its own lanes and epochs, a step holds as many of each, and nothing else changes."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.clips import ClipConfig
from pretrain.data.config import DataConfig
from pretrain.data.loader import MicroBatches, training_batches
from pretrain.data.order import Mixture, Order, lanes_of_sets
from pretrain.data.randomness import seed_of_set
from pretrain.data.reading_list import reading_list
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import Request, TrainingClips
from pretrain.errors import Refused
from tests.data.test_loader import DRAW_MASK, rebuilt

EXAMPLES = settings(max_examples=40, deadline=None)
CLIP = ClipConfig(frames=4, frame_rate=3.0, size=32)
CONFIG = DataConfig(clip=CLIP, global_batch=6, micro_batch=2, lanes=3, shards_per_window=2, workers=0)
SEED = 4


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    per_lane, seed, shards_per_window = draw(st.integers(1, 3)), draw(st.integers(0, 2**62)), draw(st.integers(1, 3))
    orders = []
    for number in range(draw(st.integers(1, 3))):
        lanes = draw(st.integers(1, 4))
        sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
        sizes[0] += max(lanes * per_lane - sum(sizes), 0)
        seed_here = seed_of_set(seed, number)
        orders.append(Order(tuple(sizes), seed_here, lanes, shards_per_window, lanes * per_lane))
    return Mixture(tuple(orders))


@EXAMPLES
@given(mixtures(), st.integers(0, 30))
def test_each_set_is_read_in_its_own_order_and_epochs(mixture, step):
    parts = mixture.parts(step)
    assert [number for number, _ in parts] == list(range(len(mixture.sets)))
    for (_, part), order in zip(parts, mixture.sets, strict=True):
        alone = order.step(step)
        assert part.epoch == alone.epoch == step // (order.samples // order.global_batch)
        assert part.samples.tolist() == alone.samples.tolist()
        assert part.positions.tolist() == alone.positions.tolist()


@EXAMPLES
@given(mixtures(), st.integers(0, 30))
def test_places_and_readers_are_those_of_a_single_set_with_so_many_lanes(mixture, step):
    places = np.concatenate([part.places for _, part in mixture.parts(step)])
    single = Order((mixture.global_batch,), 0, mixture.lanes, 1, mixture.global_batch)
    assert places.tolist() == single.step(0).places.tolist()
    for world in range(1, mixture.global_batch + 1):
        if mixture.global_batch % world:
            with pytest.raises(Refused, match=rf"data\.global_batch: .* among {world} processes; use"):
                mixture.parts(step, world, 0)
            continue
        for field in ("places", "samples", "positions"):
            divided = [getattr(p, field) for rank in range(world) for _, p in mixture.parts(step, world, rank)]
            whole = [getattr(part, field) for _, part in mixture.parts(step)]
            assert np.concatenate(divided).tolist() == np.concatenate(whole).tolist()


def test_a_mixture_of_one_set_is_that_set():
    order = Order((9, 7, 12), 5, 2, 2, 4)
    mixture = Mixture((order,))
    assert (mixture.steps_per_epoch, mixture.lanes, mixture.global_batch, mixture.seed) == (7, 2, 4, 5)
    for step in range(20):
        for rank in range(2):
            [(number, part)] = mixture.parts(step, 2, rank)
            assert number == 0
            assert all(np.array_equal(*pair) for pair in zip(part, order.step(step, 2, rank), strict=True))
            assert [order.place(0, position) for position in part.positions.tolist()] == part.places.tolist()


def test_sets_are_shuffled_and_drawn_for_differently():
    orders = [Order((20, 20), seed_of_set(3, number), 2, 2, 4) for number in range(2)]
    assert orders[0].seed == 3
    assert orders[0].epoch_order(0).tolist() != orders[1].epoch_order(0).tolist()
    assert 0 <= orders[1].seed < 2**63


@pytest.mark.parametrize(
    ("weights", "lanes", "expected"),
    [((3, 1), 4, [3, 1]), ((0.75, 0.25), 8, [6, 2]), ((0.1, 0.2, 0.7), 10, [1, 2, 7]), ((5,), 3, [3])],
)
def test_weights_that_come_out_even_give_whole_lanes(weights, lanes, expected):
    assert lanes_of_sets({str(n): weight for n, weight in enumerate(weights)}, lanes) == expected


@EXAMPLES
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 64))
def test_weights_that_do_not_come_out_even_are_refused_with_the_nearest_that_do(weights, lanes):
    named = {f"set-{number}": weight for number, weight in enumerate(weights)}
    exact = [lanes * weight / math.fsum(weights) for weight in weights]
    if all(abs(share - round(share)) < 1e-12 for share in exact):
        assert lanes_of_sets(named, lanes) == [round(share) for share in exact]
        return
    with pytest.raises(Refused) as refused:
        lanes_of_sets(named, lanes)
    if len(weights) > lanes:
        assert str(refused.value).startswith(f"data.lanes: {lanes} lanes are too few for the {len(weights)} sets")
        return
    said = str(refused.value).split("; use ")[1].removesuffix(", or other data.lanes")
    nearest = {name: int(share) for name, share in (part.split(": ") for part in said.split(", "))}
    assert lanes_of_sets(nearest, lanes) == list(nearest.values())
    if min(exact) >= 1:
        assert all(abs(share - wanted) < 1 for share, wanted in zip(nearest.values(), exact, strict=True))


def test_the_nearest_weights_are_named():
    with pytest.raises(Refused, match=r"data\.mixture: the weights 2, 1 do not .*lanes 8; use a: 5, b: 3, or other"):
        lanes_of_sets({"a": 2, "b": 1}, 8)


@pytest.fixture(scope="module")
def sets(packed_shards, other_shards) -> tuple[ShardSet, ...]:
    return ShardSet.open(packed_shards), ShardSet.open(other_shards)


def mixture_of(sets: tuple[ShardSet, ...]) -> Mixture:
    return Mixture(
        tuple(
            Order(shards.samples_per_shard, seed_of_set(SEED, number), lanes, 2, 2 * lanes)
            for number, (shards, lanes) in enumerate(zip(sets, (2, 1), strict=True))
        )
    )


def clips_of(
    sets: tuple[ShardSet, ...], steps: range, workers: int = 0, world: int = 1, rank: int = 0
) -> dict[Request, tuple]:
    config = dataclasses.replace(CONFIG, workers=workers)
    requests = MicroBatches(mixture_of(sets), steps, config.micro_batch, world, rank)
    clips = {}
    batches = training_batches(TrainingClips(sets, config, SEED, DRAW_MASK), requests)
    for asked, batch in zip(requests, batches, strict=True):
        rows = zip(batch.keys, batch.clips, batch.visible, strict=True)
        clips |= {
            one: (key, clip.numpy().tobytes(), visible.tolist())
            for one, (key, clip, visible) in zip(asked, rows, strict=True)
        }
    return clips


def test_world_workers_and_resuming_change_no_clip_of_a_mixture(sets):
    whole = clips_of(sets, range(4))
    assert len(whole) == 4 * CONFIG.global_batch
    for request, (key, _, _) in whole.items():
        assert key == sets[request.set_number].key(request.sample)
    assert clips_of(sets, range(2, 4), workers=1).items() <= whole.items()
    thirds = [clips_of(sets, range(4), world=3, rank=rank) for rank in range(3)]
    assert thirds[0] | thirds[1] | thirds[2] == whole
    assert {request.set_number for request in thirds[2]} == {1}, "a rank reads its own lanes only"
    epochs = {(request.set_number, request.epoch) for request in whole}
    assert epochs == {(0, 0), (0, 1), (1, 0), (1, 1)}, "2 steps each, of 11 and 5 samples, 4 and 2 a step"


def test_the_list_of_a_mixture_is_what_the_loader_yields(sets):
    mixture = mixture_of(sets)
    listed = list(reading_list(sets, CONFIG, mixture, range(1, 5)))
    whole = clips_of(sets, range(4))
    assert [reading.key for reading in listed] == [key for key, _, _ in whole.values()]
    for reading, (request, (_, _, visible)) in zip(listed, whole.items(), strict=True):
        assert (reading.set, reading.epoch) == (request.set_number, request.epoch)
        assert DRAW_MASK(int(reading.mask_seed, 16), 0)[0].tolist() == visible
    for step in range(1, 5):
        assert sorted(reading.place for reading in listed if reading.step == step) == list(range(6))
        assert sum(reading.set for reading in listed if reading.step == step) == 2
    assert len({reading.mask_seed for reading in listed}) == len(listed)


def test_a_damaged_sample_of_a_mixture_has_a_substitute_of_its_own_set(sets, packed_shards, other_shards, tmp_path):
    folder = rebuilt(other_shards, tmp_path / "bad", lambda number, one: b"junk" * 9 if number == 2 else one.video)
    damaged = (sets[0], ShardSet.open(folder))
    before, after = clips_of(sets, range(4)), clips_of(damaged, range(4))
    changed = {request for request in before if before[request] != after[request]}
    assert changed == {request for request in before if request.set_number == 1 and request.sample == 2}
    assert {after[request][0] for request in changed} <= {damaged[1].key(number) for number in (0, 1, 3, 4)}
    for request in changed:
        report = TrainingClips(damaged, CONFIG, SEED, DRAW_MASK)[request].skipped[0]
        assert (report["set"], report["key"]) == (1, damaged[1].key(2))
        assert json.dumps(report)
