"""Balanced sampling: shares in every step and epoch, turns within a class, and the purity of the order beside it."""

import collections
import dataclasses
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.balanced import BalancedOrder
from pretrain.data.clips import ClipConfig
from pretrain.data.config import DataConfig
from pretrain.data.order import Order
from pretrain.data.reading_list import reading_list
from pretrain.data.shards import ShardSet
from pretrain.errors import Refused

EXAMPLES = settings(max_examples=40, deadline=None)
CLOSE = 1e-6  # a share that is whole to this is whole


@st.composite
def balanced_orders(draw: st.DrawFn) -> BalancedOrder:
    """Classes of very unequal size, some of them empty, in any order of samples."""
    sizes = draw(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 60)), min_size=1, max_size=8).filter(any))
    labels = draw(st.permutations([number for number, size in enumerate(sizes) for _ in range(size)]))
    lanes = draw(st.integers(1, min(6, len(labels))))
    per_lane = draw(st.integers(1, min(8, len(labels) // lanes)))
    power = draw(st.sampled_from([0.0, 0.25, 0.5, 1 / 3, 0.9, 1.0]))
    return BalancedOrder(tuple(labels), draw(st.integers(0, 2**40)), lanes, lanes * per_lane, power)


def counts_of(order: BalancedOrder, steps: range) -> collections.Counter:
    return collections.Counter(order.labels[sample] for step in steps for sample in order.step(step).samples.tolist())


def assert_rounded(counts: collections.Counter, shares: dict[int, float], places: int) -> None:
    assert sum(counts.values()) == places
    for number, share in shares.items():
        assert math.floor(places * share + CLOSE) <= counts[number] <= math.ceil(places * share - CLOSE)


@EXAMPLES
@given(balanced_orders(), st.integers(0, 50))
def test_each_step_holds_every_class_in_its_share_rounded_down_or_up(order, step):
    assert_rounded(counts_of(order, range(step, step + 1)), order.shares(), order.global_batch)


@EXAMPLES
@given(balanced_orders(), st.integers(0, 9))
def test_each_epoch_holds_every_class_in_its_share_rounded_down_or_up(order, epoch):
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    assert_rounded(counts_of(order, steps), order.shares(), len(steps) * order.global_batch)


@EXAMPLES
@given(balanced_orders(), st.integers(1, 12))
def test_what_a_class_misses_in_one_epoch_it_gets_in_another(order, epochs):
    places = order.steps_per_epoch * order.global_batch * epochs
    counts = counts_of(order, range(order.steps_per_epoch * epochs))
    for number, share in order.shares().items():
        assert abs(counts[number] - places * share) < 4


@EXAMPLES
@given(balanced_orders())
def test_shares_grow_with_the_power_of_the_count(order):
    sizes = collections.Counter(order.labels)
    weights = {number: size**order.power for number, size in sizes.items()}
    assert order.shares() == pytest.approx({number: w / sum(weights.values()) for number, w in weights.items()})
    with_more_classes = dataclasses.replace(order, labels=tuple(2 * label + 1 for label in order.labels))
    assert list(with_more_classes.shares().values()) == list(order.shares().values())


@EXAMPLES
@given(balanced_orders(), st.integers(1, 60))
def test_no_sample_comes_again_before_all_others_of_its_class_came_as_often(order, steps):
    times = collections.Counter(dict.fromkeys(range(order.samples), 0))
    for step in range(steps):
        times.update(order.step(step).samples.tolist())
        for members in order.classes.values():
            counts = [times[sample] for sample in members.tolist()]
            assert max(counts) - min(counts) <= 1


@EXAMPLES
@given(balanced_orders(), st.integers(0, 300))
def test_every_world_reads_the_same_step_in_the_same_places(order, step):
    whole = order.step(step)
    epoch, in_epoch = divmod(step, order.samples // order.global_batch)
    positions = in_epoch * order.global_batch + whole.places
    assert (whole.epoch, whole.positions.tolist()) == (epoch, positions.tolist())
    assert [order.place(0, position) for position in positions.tolist()] == whole.places.tolist()
    unbalanced = Order((order.samples,), order.seed, order.lanes, 1, order.global_batch)
    assert whole.places.tolist() == unbalanced.step(step).places.tolist()
    for world in range(1, order.global_batch + 1):
        if order.global_batch % world:
            with pytest.raises(Refused, match=rf"data\.global_batch: .* among {world} processes; use"):
                order.step(step, world, 0)
            continue
        parts = [order.parts(step, world, rank) for rank in range(world)]
        assert {number for ((number, _),) in parts} == {0}
        for field in ("places", "positions", "samples"):
            joined = np.concatenate([getattr(part, field) for ((_, part),) in parts])
            assert joined.tolist() == getattr(whole, field).tolist()


@EXAMPLES
@given(balanced_orders(), st.lists(st.integers(0, 300), min_size=2, max_size=6))
def test_a_step_does_not_depend_on_the_steps_read_before(order, steps):
    for step in steps:
        fresh = dataclasses.replace(order)
        assert order.step(step).samples.tolist() == fresh.step(step).samples.tolist()


def test_rounds_steps_seeds_and_classes_are_shuffled_differently():
    labels = (0,) * 64 + (1,) * 64
    order = BalancedOrder(labels, 0, 1, 64, 0.0)
    epochs = [np.concatenate([order.step(2 * epoch + step).samples for step in range(2)]) for epoch in range(2)]
    for ours in (0, 1):
        rounds = [epoch[epoch // 64 == ours].tolist() for epoch in epochs]
        assert sorted(rounds[0]) == sorted(rounds[1])
        assert rounds[0] != rounds[1]
    classes = [(order.step(step).samples // 64).tolist() for step in range(4)]
    assert len({tuple(one) for one in classes}) == 4
    assert all(12 < np.count_nonzero(np.diff(one)) < 52 for one in classes), "32 of each, mixed within a step"
    assert [one % 64 for one in epochs[0] if one < 64] != [one % 64 for one in epochs[0] if one >= 64]
    assert order.step(0).samples.tolist() != dataclasses.replace(order, seed=1).step(0).samples.tolist()


def test_rare_classes_are_spread_over_an_epoch():
    """64 of 4096 places are a class's; it stands in every sixteenth step, not in the first 64 of 1024."""
    order = BalancedOrder((0,) * 4032 + (1,) * 64, 0, 1, 4, 1.0)
    rare = np.flatnonzero([1 in {order.labels[s] for s in order.step(step).samples.tolist()} for step in range(1024)])
    assert len(rare) == 64
    assert np.diff(rare).max() < 40


def test_an_order_never_changes_between_versions():
    labels = tuple((np.arange(300) ** 2 % 97 % 11 % 7).tolist())
    content = b""
    for power in (0.0, 0.3, 0.5, 1.0):
        order = BalancedOrder(labels, 20, 3, 24, power)
        parts = [np.concatenate(order.step(step, 2, rank)[1:]) for step in (0, 5, 11, 12, 700) for rank in (0, 1)]
        content += b"".join(part.astype("<i8").tobytes() for part in parts)
    assert hashlib.sha256(content).hexdigest()[:32] == "7fdafe2707765b12d4cf6d429016c23f"


def test_what_does_not_come_out_even_is_refused_with_the_nearest_that_does():
    with pytest.raises(Refused, match=r"data\.lanes: 5 lanes do not divide data\.global_batch 12; use 4"):
        BalancedOrder((0, 1) * 20, 0, 5, 12, 0.5)
    with pytest.raises(Refused, match=r"data\.global_batch: 12 is more than the 11 samples .* use at most 11"):
        BalancedOrder((0,) * 11, 0, 1, 12, 0.5)


@settings(max_examples=10, deadline=None)
@given(st.data(), st.integers(0, 4))
def test_the_list_is_the_same_for_any_world_workers_and_resume_step(packed_shards, data, workers):
    shards = ShardSet.open(packed_shards)
    first, seed = data.draw(st.integers(1, 30)), data.draw(st.integers(0, 2**62))
    labels = tuple(shards.labels())
    clip = ClipConfig(frames=4, stride=1)
    config = DataConfig(clip=clip, global_batch=8, micro_batch=1, lanes=2, workers=workers, repeats=2)
    steps = range(first, first + 4)
    alone = list(reading_list(shards, config, BalancedOrder(labels, seed, 2, 8, 0.5), steps))
    later = data.draw(st.integers(first, first + 3))
    for world in (1, 2, 4, 8):
        order = BalancedOrder(labels, seed, 2, 8, 0.5)
        readings = list(reading_list(shards, config, order, range(later, first + 4), world, later - 1))
        expected = alone[(later - first) * 16 :]
        assert [one._replace(rank=0, worker=None) for one in readings] == [
            one._replace(rank=0, worker=None) for one in expected
        ]
        assert [one.rank for one in readings[:16]] == [rank for rank in range(world) for _ in range(16 // world)]


def test_the_example_in_the_readme_is_true():
    readme = (Path(__file__).parents[2] / "pretrain/data/README.md").read_text()
    sizes = {"r": 10, "j": 4, "s": 2}
    names = np.array([f"{name}{number}" for name, size in sizes.items() for number in range(size)])
    labels = tuple(label for label, size in enumerate(sizes.values()) for _ in range(size))
    order = BalancedOrder(labels, seed=0, lanes=1, global_batch=4, power=0.5)
    assert [round(100 * share) for share in order.shares().values()] == [48, 30, 22]
    for epoch in range(2):
        steps = [" ".join(names[order.step(4 * epoch + step).samples]) for step in range(4)]
        assert f"    epoch {epoch}    {'   '.join(steps)}\n" in readme
