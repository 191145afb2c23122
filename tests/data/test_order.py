"""The order of samples, point by point as the design states it, over many sizes, lanes, shard windows and worlds."""

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import re
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.clips import ClipConfig
from pretrain.data.config import DataConfig
from pretrain.data.order import Order, nearest_divisor, nearest_multiple
from pretrain.data.randomness import key_for, permutation
from pretrain.data.reading_list import Reading, reading_list
from pretrain.data.shard_writer import PackedSample, write_shard
from pretrain.data.shards import ShardSet
from pretrain.data.transcode import Transcoded
from pretrain.errors import Refused

EXAMPLES = settings(max_examples=40, deadline=None)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = draw(st.lists(st.integers(1, 20), min_size=1, max_size=12))
    lanes = draw(st.integers(1, min(6, sum(sizes))))
    per_lane = draw(st.integers(1, min(8, sum(sizes) // lanes)))
    return Order(tuple(sizes), draw(st.integers(0, 2**40)), lanes, draw(st.integers(1, 4)), lanes * per_lane)


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def line_of(order: Order) -> np.ndarray:
    """Point 1 by other means: the shards end to end, as the seed permutes them."""
    shards = np.split(np.arange(order.samples), np.cumsum(order.samples_per_shard)[:-1])
    return np.concatenate([shards[shard] for shard in permutation(key_for(order.seed, "shards"), len(shards))])


def shard_of(order: Order) -> np.ndarray:
    return np.repeat(np.arange(len(order.samples_per_shard)), order.samples_per_shard)


@EXAMPLES
@given(orders(), st.integers(0, 3))
def test_an_epoch_reads_each_sample_once_but_for_the_tail(order, epoch):
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    read = np.concatenate([order.step(step).samples for step in steps])
    assert len(set(read.tolist())) == len(read) == order.samples - order.samples % order.global_batch
    assert sorted(order.epoch_order(epoch).tolist()) == list(range(order.samples))


@EXAMPLES
@given(orders())
def test_lanes_are_equal_stretches_of_the_line_of_shards(order):
    stretches = np.array_split(line_of(order), order.lanes)
    for lane, stretch in enumerate(stretches):
        assert np.concatenate(order.lane_pieces[lane]).tolist() == stretch.tolist()
        assert order.samples_in_lane(lane) == len(stretch)
    assert max(map(len, stretches)) - min(map(len, stretches)) <= 1


@EXAMPLES
@given(orders(), st.integers(0, 5))
def test_a_lane_keeps_its_samples_in_every_epoch(order, epoch):
    for lane in range(order.lanes):
        assert set(order.lane_order(epoch, lane).tolist()) == set(np.concatenate(order.lane_pieces[lane]).tolist())
        assert len(order.lane_order(epoch, lane)) == order.samples_in_lane(lane)


@EXAMPLES
@given(orders(), st.integers(0, 3))
def test_a_shard_window_is_read_whole_before_the_next_begins(order, epoch):
    shards = shard_of(order)
    for lane in range(order.lanes):
        sizes = {int(shards[piece[0]]): len(piece) for piece in order.lane_pieces[lane]}
        left = shards[order.lane_order(epoch, lane)].tolist()
        opened = 0
        while left:
            pieces = list(dict.fromkeys(left))[: order.shards_per_window]
            held = sum(sizes[piece] for piece in pieces)
            shard_window, left = left[:held], left[held:]
            # First sight tells its shards only if it is shuffled whole: no shard of another may come in between.
            assert collections.Counter(shard_window) == {piece: sizes[piece] for piece in pieces}
            opened += len(pieces)
        assert opened == len(sizes)


@EXAMPLES
@given(orders(), st.integers(0, 3))
def test_lanes_take_turns_in_an_epoch(order, epoch):
    lanes = [order.lane_order(epoch, lane) for lane in range(order.lanes)]
    expected = [lanes[p % order.lanes][p // order.lanes] for p in range(order.samples)]
    assert order.epoch_order(epoch).tolist() == expected


@EXAMPLES
@given(orders(), st.integers(0, 20))
def test_a_step_takes_the_next_positions_of_its_epoch(order, step):
    epoch, in_epoch = divmod(step, order.samples // order.global_batch)
    whole = order.step(step)
    positions = in_epoch * order.global_batch + np.arange(order.global_batch)
    assert (whole.epoch, sorted(whole.positions.tolist())) == (epoch, positions.tolist())
    assert np.array_equal(whole.samples, order.epoch_order(epoch)[whole.positions])
    assert np.array_equal(whole.places, whole.positions - positions[0])


@EXAMPLES
@given(orders(), st.integers(0, 30), st.data())
def test_an_order_with_another_global_batch_goes_on_where_the_one_before_it_stopped(before, step, data):
    batches = range(before.lanes, before.samples + 1, before.lanes)
    after = dataclasses.replace(before, global_batch=data.draw(st.sampled_from(batches))).going_on_from(before, step)
    epoch, read = divmod(step, before.steps_per_epoch)
    read *= before.global_batch
    steps = (before.samples - read) // after.global_batch
    slices = [after.step(number) for number in range(step, step + steps + after.steps_per_epoch)]
    rest = np.concatenate([np.array([], dtype=int), *(np.sort(one.positions) for one in slices[:steps])])
    assert rest.tolist() == list(range(read, read + steps * after.global_batch))
    assert {one.epoch for one in slices[:steps]} <= {epoch}
    following = np.concatenate([np.sort(one.positions) for one in slices[steps:]])
    assert following.tolist() == list(range(after.steps_per_epoch * after.global_batch))
    assert {one.epoch for one in slices[steps:]} == {epoch + 1}
    for one in slices:
        assert np.array_equal(one.samples, before.epoch_order(one.epoch)[one.positions])
        assert sorted(one.places.tolist()) == list(range(after.global_batch))
    assert after.length_in_steps(epoch + 2) == step + len(slices)
    again = dataclasses.replace(before, global_batch=before.global_batch).going_on_from(after, step + len(slices))
    assert again.reached(step + len(slices)) == (epoch + 2, 0)


@EXAMPLES
@given(orders(), st.integers(0, 20))
def test_every_world_reads_the_same_step_in_the_same_places(order, step):
    whole = order.step(step)
    for world in divisors(order.global_batch):
        parts = [order.step(step, world, rank) for rank in range(world)]
        assert {part.epoch for part in parts} == {whole.epoch}
        assert {len(part.places) for part in parts} == {order.global_batch // world}
        for field in ("places", "positions", "samples"):
            joined = np.concatenate([getattr(part, field) for part in parts])
            assert joined.tolist() == getattr(whole, field).tolist()
    assert sorted(whole.places.tolist()) == list(range(order.global_batch))


@EXAMPLES
@given(orders(), st.integers(0, 20))
def test_places_in_rank_order_are_grouped_by_lane(order, step):
    """Point 5: place j stands at (j mod lanes) * (global_batch / lanes) + j div lanes."""
    places = order.step(step).places
    for rank_order, j in enumerate(places.tolist()):
        assert rank_order == j % order.lanes * (order.global_batch // order.lanes) + j // order.lanes


class Cluster(NamedTuple):
    order: Order
    nodes: int
    world: int


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Shards of equal size, and nodes that divide the lanes."""
    nodes, lanes_per_node, ranks_per_node = (draw(st.integers(1, 4)) for _ in range(3))
    shards, size = draw(st.integers(4, 40)), draw(st.integers(4, 12))
    lanes = nodes * lanes_per_node
    global_batch = lanes * ranks_per_node
    if global_batch > shards * size:
        shards = -(-global_batch // size)
    order = Order((size,) * shards, draw(st.integers(0, 2**40)), lanes, draw(st.integers(1, 4)), global_batch)
    return Cluster(order, nodes, nodes * ranks_per_node)


@EXAMPLES
@given(clusters())
def test_a_node_reads_its_own_lanes_and_few_shards_in_every_epoch(cluster):
    order, nodes, world = cluster
    shards = shard_of(order)
    lanes_per_node = order.lanes // nodes
    for node in range(nodes):
        ranks = range(node * world // nodes, (node + 1) * world // nodes)
        steps = range(2 * order.steps_per_epoch)
        read = np.concatenate([order.step(step, world, rank).samples for step in steps for rank in ranks])
        own = range(node * lanes_per_node, (node + 1) * lanes_per_node)
        assert set(read.tolist()) <= {int(n) for lane in own for piece in order.lane_pieces[lane] for n in piece}
        assert len(set(shards[read].tolist())) <= 1.1 / nodes * len(order.samples_per_shard) + 2


def test_epochs_seeds_and_lanes_are_shuffled_differently():
    order = Order((16,) * 8, 0, 2, 2, 16)
    first, second = order.lane_order(0, 0), order.lane_order(1, 0)
    assert first.tolist() != second.tolist()
    assert np.mean(np.argsort(first) == np.argsort(second)) < 0.2
    other_seed = Order((16,) * 8, 1, 2, 2, 16)
    assert order.epoch_order(0).tolist() != other_seed.epoch_order(0).tolist()
    ranks = [np.argsort(np.argsort(order.lane_order(0, lane))).tolist() for lane in range(2)]
    assert ranks[0] != ranks[1]


def test_the_pieces_of_a_shard_window_are_mixed():
    order = Order((16,) * 4, 0, 1, 4, 16)
    shards = shard_of(order)[order.lane_order(0, 0)]
    assert np.count_nonzero(np.diff(shards)) > 30, "read one after the other, the shard would change three times"
    alone = shard_of(order)[Order((16,) * 4, 0, 1, 1, 16).lane_order(0, 0)]
    assert np.count_nonzero(np.diff(alone)) == 3


def test_an_order_never_changes_between_versions():
    order = Order((5, 9, 1, 7, 12, 3, 8), seed=20, lanes=3, shards_per_window=2, global_batch=12)
    first = np.concatenate([order.epoch_order(epoch) for epoch in range(3)])
    assert first[:12].tolist() == [36, 30, 4, 10, 25, 2, 13, 17, 21, 8, 32, 0]
    steps = np.concatenate([np.concatenate(order.step(step, 2, 1)[1:]) for step in range(8)])
    content = first.astype("<i8").tobytes() + steps.astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest() == "92e3efee723047bb6265d055668bcb5cc8ace7d50bc1f75d56e26fc3e265ec36"


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (Order((400,) * 30, 0, 8, 8, 64), "d4b402ce713e86449971198266382269"),
        (Order((37, 512, 1, 90) * 25, 2**40 + 1, 16, 3, 240), "0eccebca276017419b007d66fa6f27f9"),
        (Order((5000, 1, 2999), 7, 2, 8, 100), "e7fee5628adf74dc09ed4830dbf1ccdd"),
        (Order((1,) * 50, 1, 10, 2, 50), "fd45947ff37052708336ad7f62000028"),
    ],
)
def test_large_orders_never_change_between_versions(order, expected):
    content = b"".join(order.epoch_order(epoch).astype("<i8").tobytes() for epoch in (0, 1, 7))
    for step in (0, 3, order.steps_per_epoch, 5 * order.steps_per_epoch - 1):
        parts = [np.concatenate(order.step(step, 2, rank)[1:]) for rank in (1, 0)]
        content += b"".join(part.astype("<i8").tobytes() for part in parts)
    assert hashlib.sha256(content).hexdigest()[:32] == expected


def test_a_step_does_not_depend_on_the_steps_read_before():
    order = Order((37, 12, 1, 90) * 4, 3, 4, 3, 16)
    forwards = [order.step(step, 2, 1).samples.tolist() for step in range(3 * order.steps_per_epoch)]
    for step in (*reversed(range(len(forwards))), 5, 40, 6, 7):
        assert order.step(step, 2, 1).samples.tolist() == forwards[step]
        assert Order((37, 12, 1, 90) * 4, 3, 4, 3, 16).step(step, 2, 1).samples.tolist() == forwards[step]


def test_a_step_holds_no_more_than_the_shard_windows_that_it_reads():
    order = Order((500,) * 2000, 0, 64, 4, 128)
    assert len(order.lane_pieces) == 64, "made before measuring: a small table of all shards"
    tracemalloc.start()
    order.step(3000, 64, 7)
    held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held_bytes < 2.5 * 8 * 4 * 500
    assert peak_bytes < 8 * order.samples / 16


@pytest.fixture(scope="module")
def listed_shards(tmp_path_factory) -> ShardSet:
    """Shards of many sizes with 617 samples of many lengths, which nobody decodes."""
    folder = tmp_path_factory.mktemp("listed")
    sizes, entries = (90, 7, 120, 64, 1, 200, 33, 102), []
    for shard, size in enumerate(sizes):
        videos = [Transcoded(b"unread", 3 + (7 * row + shard) % 60, 12.5 + row % 3, 48, 64) for row in range(size)]
        samples = [PackedSample(f"{shard}-{row}", "", None, video) for row, video in enumerate(videos)]
        entries.append(dataclasses.asdict(write_shard(folder / f"shard-{shard:06d}.tar", samples)))
    index = {"format_version": 1, "classes": [], "frame_rate": None, "resampled": False, "short_side": 48}
    (folder / "index.json").write_text(json.dumps({**index, "samples": sum(sizes), "shards": entries}))
    return ShardSet.open(folder)


def listed(shards: ShardSet, config: DataConfig, seed: int, steps: range, world: int, resumed_at: int) -> list[Reading]:
    """Lists what an attempt reads, by an order that has read nothing before."""
    order = Order(shards.samples_per_shard, seed, config.lanes, config.shards_per_window, config.global_batch)
    config = dataclasses.replace(config, micro_batch=math.gcd(config.global_batch // world, config.micro_batch))
    return list(reading_list(shards, config, order, steps, world, resumed_at))


def without_readers(readings: list[Reading]) -> list[Reading]:
    return [reading._replace(rank=0, worker=None) for reading in readings]


@settings(max_examples=8, deadline=None)
@given(st.data(), st.sampled_from([48, 64, 240]), st.integers(0, 4))
def test_the_list_is_the_same_for_any_world_workers_and_resume_step(listed_shards, data, global_batch, workers):
    lanes = data.draw(st.sampled_from(divisors(global_batch)))
    first = data.draw(st.integers(1, 40))
    seed = data.draw(st.integers(0, 2**62))
    clip = ClipConfig(frames=4, stride=data.draw(st.integers(1, 5)))
    config = DataConfig(clip=clip, global_batch=global_batch, lanes=lanes, shards_per_window=2, micro_batch=4)
    steps = range(first, first + 3)
    alone = listed(listed_shards, dataclasses.replace(config, workers=0), seed, steps, 1, 0)
    assert {reading.rank for reading in alone} == {0}
    assert {reading.worker for reading in alone} == {None}
    resumed_at = data.draw(st.integers(0, first - 1))
    later = data.draw(st.integers(first, first + 2))
    for world in range(1, 17):
        divided = dataclasses.replace(config, workers=workers, repeats=1)
        if global_batch % world:
            nearest = nearest_multiple(global_batch, world, lanes)
            refusal = rf"data\.global_batch: {global_batch} .* among {world} processes; use {nearest}$"
            with pytest.raises(Refused, match=refusal):
                listed(listed_shards, divided, seed, steps, world, resumed_at)
            continue
        readings = listed(listed_shards, divided, seed, steps[later - first :], world, resumed_at)
        assert without_readers(readings) == without_readers(alone)[(later - first) * global_batch :]
        assert [reading.rank for reading in readings[:global_batch]] == [
            rank for rank in range(world) for _ in range(global_batch // world)
        ]
        assert {reading.worker for reading in readings} <= (set(range(workers)) if workers else {None})


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([(48, 16), (64, 4), (240, 15)]), st.integers(0, 4), st.integers(0, 2**62), st.booleans())
def test_a_sample_is_listed_once_in_an_epoch_but_for_the_tail(listed_shards, batch_and_world, epoch, seed, many_lanes):
    global_batch, world = batch_and_world
    lanes = global_batch if many_lanes else 4
    clip = ClipConfig(frames=4, stride=1)
    config = DataConfig(clip=clip, global_batch=global_batch, lanes=lanes, shards_per_window=3, micro_batch=1)
    per_epoch = listed_shards.samples // global_batch
    steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
    readings = listed(listed_shards, config, seed, steps, world, 0)
    assert {reading.epoch for reading in readings} == {epoch}
    assert len({reading.key for reading in readings}) == len(readings)
    assert len(readings) == listed_shards.samples - listed_shards.samples % global_batch
    for step in steps:
        places = sorted(reading.place for reading in readings if reading.step == step)
        assert places == list(range(global_batch))
    assert len({reading.mask_seed for reading in readings}) == len(readings)


def test_an_epoch_given_as_a_number_of_numpy_is_the_same_epoch():
    order = Order((9, 7), 3, 2, 1, 4)
    assert order.lane_order(np.int64(1), 0).tolist() == order.lane_order(1, 0).tolist()


@pytest.mark.parametrize(("lanes", "nearest"), [(5, 4), (7, 6), (11, 12), (30, 12), (8, 6)])
def test_lanes_that_do_not_divide_the_batch_are_refused_with_the_nearest_that_do(lanes, nearest):
    with pytest.raises(Refused, match=rf"data\.lanes: {lanes} lanes .* data\.global_batch 12; use {nearest}$"):
        Order((20,), 0, lanes, 1, 12)
    Order((20,), 0, nearest, 1, 12)


@pytest.mark.parametrize(
    ("global_batch", "lanes", "world", "nearest"), [(8, 1, 3, 9), (10, 1, 4, 8), (8, 8, 3, 24), (2, 2, 5, 10)]
)
def test_a_world_that_does_not_divide_the_batch_is_refused_with_a_batch_that_works(global_batch, lanes, world, nearest):
    with pytest.raises(Refused, match=rf"data\.global_batch: {global_batch} .* {world} processes; use {nearest}$"):
        Order((40,), 0, lanes, 1, global_batch).step(0, world, 0)
    Order((40,), 0, lanes, 1, nearest).step(0, world, 0)


def test_a_batch_larger_than_the_set_is_refused_with_the_largest_that_fits():
    with pytest.raises(Refused, match=r"data\.global_batch: 12 is more than the 11 samples .* use at most 11"):
        Order((4, 4, 3), 0, 1, 1, 12)
    assert Order((4, 4, 3), 0, 1, 1, 11).steps_per_epoch == 1


@EXAMPLES
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 12))
def test_the_nearest_number_that_works_is_the_nearest(number, wanted, other):
    divisor, multiple = nearest_divisor(number, wanted), nearest_multiple(number, wanted, other)
    assert number % divisor == 0
    assert all(abs(divisor - wanted) <= abs(d - wanted) for d in divisors(number))
    assert multiple % wanted == multiple % other == 0 < multiple
    multiples = [m for m in range(1, number + wanted * other + 1) if m % wanted == m % other == 0]
    assert all(abs(multiple - number) <= abs(m - number) for m in multiples)


def test_the_drawing_in_the_readme_is_true():
    readme = (Path(__file__).parents[2] / "pretrain/data/README.md").read_text()
    sizes = {"A": 6, "B": 4, "C": 6, "D": 4, "E": 5}
    names = np.array([f"{shard}{number}" for shard, size in sizes.items() for number in range(size)])
    order = Order(tuple(sizes.values()), seed=0, lanes=2, shards_per_window=2, global_batch=8)
    assert "|".join(" ".join(names[list(itertools.chain(*lane))]) for lane in order.lane_pieces) in readme
    for epoch in range(2):
        for lane in range(2):
            drawn = re.search(rf"epoch {epoch}    lane 0.*\n *lane 1.*", readme).group().splitlines()[lane]
            assert (
                drawn.replace(" | ", " ")
                .split("lane ")[1]
                .startswith(f"{lane}   {' '.join(names[order.lane_order(epoch, lane)])}")
            )
        steps = np.split(names[order.epoch_order(epoch)], [8, 16, 24])
        assert f"    epoch {epoch}    {'  '.join(map(' '.join, steps))}" in readme
    step = order.step(1)
    assert f"place    {'   '.join('  '.join(map(str, half)) for half in np.split(step.places, 2))}" in readme
    assert f"sample   {'  '.join(' '.join(half) for half in np.split(names[step.samples], 2))}" in readme
