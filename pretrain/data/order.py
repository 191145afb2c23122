"""The order of samples: which sample stands where, in every step of a run, as pure functions of a few integers.

Nothing here reads a file or knows a process. Resuming is one integer, and the world or the number of workers may
change in the middle of a run, because neither decides which samples a step holds: they only divide the step's places.

    line     the shards, permuted once by the seed, laid end to end
    lanes    the line cut into equal stretches; a lane keeps its samples for the whole run, so caches stay warm
    epoch    in each lane: its pieces of shards permuted, cut into shard windows, shuffled inside each
    position p of the epoch is sample p div lanes of lane p mod lanes: lanes take turns
    step     takes global_batch positions in a row; place j is the j-th of them
    start    where an order takes over from one with another global batch: the epoch and position reached by it
    rank     the places in rank order are grouped by lane, so a rank (and its node) reads few lanes
    mixture  several sets, each with whole lanes of its own and epochs of its own

A step shuffles only the shard windows that it reads, so that neither starting nor resuming depends on the set's size.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from pretrain.data.randomness import key_for, permutation
from pretrain.errors import Refused

INTERLEAVED_LANES = 16  # written together, so that whole lines of the processor's cache are


class Slice(NamedTuple):
    """What one rank reads in one step, in the order of its micro-batches.

    Attributes:
        epoch: The epoch, from 0.
        places: `(global_batch / world,)` places in the global batch.
        positions: Positions in the epoch's order, one for each place.
        samples: Sample numbers, one for each place.
    """

    epoch: int
    places: np.ndarray
    positions: np.ndarray
    samples: np.ndarray


class Start(NamedTuple):
    """Where an order takes over from one with another global batch; a run's first order starts at its beginning.

    Attributes:
        step: Steps that were done before.
        epoch: The epoch that they reached.
        position: The first position of it that was not read.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0


BEGINNING = Start()


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of a whole run over one set of shards.

    Attributes:
        samples_per_shard: Samples in each shard, in the order of the shard index.
        seed: Seed of every shuffle.
        lanes: Number of lanes; divides `global_batch`. Stored with the run, never derived from the world.
        shards_per_window: Pieces of shards that are shuffled together.
        global_batch: Samples in one step over all ranks.
        start: What is before it was read with another global batch; the steps before it are not asked for.
    """

    samples_per_shard: tuple[int, ...]
    seed: int
    lanes: int
    shards_per_window: int
    global_batch: int
    start: Start = BEGINNING

    def __post_init__(self) -> None:
        """Refuses what would not come out even, naming the nearest that does."""
        refuse_uneven(self.samples, self.lanes, self.global_batch)

    @functools.cached_property
    def samples(self) -> int:
        """Samples in the set."""
        return sum(self.samples_per_shard)

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in an epoch; the few positions past them are not read in that epoch."""
        return self.samples // self.global_batch

    @functools.cached_property
    def lane_pieces(self) -> list[list[range]]:
        """For each lane its pieces of shards, each the sample numbers from one to another, in the order of the line."""
        sizes = np.asarray(self.samples_per_shard)
        shard_order = permutation(key_for(self.seed, "shards"), len(sizes))
        line_starts = np.cumsum([0, *sizes[shard_order]])
        lane_starts = np.cumsum([0] + [self.samples_in_lane(lane) for lane in range(self.lanes)])
        cuts = np.unique(np.concatenate([line_starts, lane_starts]))
        begins, lengths = cuts[:-1], np.diff(cuts)
        shards = np.searchsorted(line_starts, begins, side="right") - 1
        first_numbers = (np.cumsum(sizes) - sizes)[shard_order[shards]] + begins - line_starts[shards]
        lanes = np.searchsorted(lane_starts, begins, side="right") - 1
        pieces: list[list[range]] = [[] for _ in range(self.lanes)]
        for lane, first, length in zip(lanes.tolist(), first_numbers.tolist(), lengths.tolist(), strict=True):
            pieces[lane].append(range(first, first + length))
        return pieces

    def samples_in_lane(self, lane: int) -> int:
        """Samples in a lane; lanes differ by one at most."""
        return self.samples // self.lanes + (lane < self.samples % self.lanes)

    def lane_order(self, epoch: int, lane: int) -> np.ndarray:
        """Returns the sample numbers of a lane in the order in which epoch `epoch` reads them."""
        return _LaneEpoch(self, epoch, lane).rows(0, self.samples_in_lane(lane))

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Returns `(samples,)` sample numbers: entry p is the sample at position p of the epoch."""
        rows = self.samples // self.lanes
        interleaved = np.empty(self.samples, dtype=np.int64)
        turns = interleaved[: rows * self.lanes].reshape(rows, self.lanes)
        for first in range(0, self.lanes, INTERLEAVED_LANES):
            lanes = range(first, min(first + INTERLEAVED_LANES, self.lanes))
            orders = [self.lane_order(epoch, lane) for lane in lanes]
            turns[:, first : lanes.stop] = np.stack([order[:rows] for order in orders], axis=1)
            last = [order[rows] for order in orders if len(order) > rows]
            interleaved[turns.size + first :][: len(last)] = last
        return interleaved

    def step(self, step: int, world: int = 1, rank: int = 0) -> Slice:
        """Returns what `rank` of `world` reads in step `step` of the run.

        Raises:
            Refused: `world` does not divide `global_batch`.
        """
        return self.stretch(step, *stretch_of_rank(self.global_batch, self.lanes, world, rank))

    def parts(self, step: int, world: int = 1, rank: int = 0) -> list[tuple[int, Slice]]:
        """Returns what `Mixture.parts` does, of a single set."""
        return [(0, self.step(step, world, rank))]

    def place(self, set_number: int, position: int) -> int:
        """Returns where the sample at a position of an epoch stands in the global batch."""
        return position % self.global_batch

    def stretch(self, step: int, first: int, end: int) -> Slice:
        """Returns what stands from `first` to `end` in rank order in step `step`.

        Only the shard windows that are read are shuffled, and kept for the steps that follow.
        """
        epoch, position = self.reached(step)
        per_lane = self.global_batch // self.lanes
        places = places_in_rank_order(self.global_batch, self.lanes)[first:end]
        samples = []
        for lane in range(first // per_lane, -(-end // per_lane)):
            low, high = max(first - lane * per_lane, 0), min(end - lane * per_lane, per_lane)
            row = position // self.lanes
            samples.append(self._lane_epoch(epoch, lane).rows(row + low, row + high))
        return Slice(epoch, places, position + places, np.concatenate(samples))

    def reached(self, step: int) -> tuple[int, int]:
        """Returns the epoch of a step and the first position in it that the step reads, a multiple of `lanes`."""
        steps = step - self.start.step
        if steps < self._steps_left:
            return self.start.epoch, self.start.position + steps * self.global_batch
        epochs, step_in_epoch = divmod(steps - self._steps_left, self.steps_per_epoch)
        return self.start.epoch + 1 + epochs, step_in_epoch * self.global_batch

    @property
    def _steps_left(self) -> int:
        """Whole steps in the epoch in which the order starts."""
        return (self.samples - self.start.position) // self.global_batch

    def going_on_from(self, before: "Order", step: int) -> "Order":
        """Returns this order from `step` on, after one that differs from it in `global_batch` alone."""
        return dataclasses.replace(self, start=Start(step, *before.reached(step)))

    def length_in_steps(self, epochs: float) -> int:
        """Returns the steps of a run of so many epochs, those before `start` included."""
        return self.start.step + round(self._steps_left + (epochs - self.start.epoch - 1) * self.steps_per_epoch)

    def _lane_epoch(self, epoch: int, lane: int) -> "_LaneEpoch":
        kept = self._lane_epochs.get(lane)
        if kept is None or kept.epoch != epoch:
            kept = self._lane_epochs[lane] = _LaneEpoch(self, epoch, lane)
        return kept

    @functools.cached_property
    def _lane_epochs(self) -> "dict[int, _LaneEpoch]":
        return {}


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The order of a whole run over several sets: in each step each of them has the same number of places.

    The lanes of all sets are numbered through, and what a lane reads in a step is as many samples in every set; so the
    places of a step, and who reads them, are those of a single set with so many lanes. Each set has its own epochs.

    Attributes:
        sets: The order of each set; its `global_batch` is its share of a step.
    """

    sets: tuple[Order, ...]

    @property
    def seed(self) -> int:
        """The run's seed, which is that of the first set."""
        return self.sets[0].seed

    @property
    def lanes(self) -> int:
        """Lanes of all sets together."""
        return sum(order.lanes for order in self.sets)

    @property
    def global_batch(self) -> int:
        """Samples in one step over all ranks and sets."""
        return sum(order.global_batch for order in self.sets)

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps that read as many samples as all sets hold; what the length of a run in epochs counts."""
        return sum(order.samples for order in self.sets) // self.global_batch

    def parts(self, step: int, world: int = 1, rank: int = 0) -> list[tuple[int, Slice]]:
        """Returns what `rank` of `world` reads in step `step` of the run, as the numbers of sets and the slice of each.

        Epochs and positions are the set's own, places those of the whole global batch.

        Raises:
            Refused: `world` does not divide `global_batch`.
        """
        first, end = stretch_of_rank(self.global_batch, self.lanes, world, rank)
        parts = []
        start = 0
        for number, order in enumerate(self.sets):
            low, high = max(first - start, 0), min(end - start, order.global_batch)
            if low < high:
                part = order.stretch(step, low, high)
                places = np.array([self.place(number, position) for position in part.positions.tolist()])
                parts.append((number, part._replace(places=places)))
            start += order.global_batch
        return parts

    def place(self, set_number: int, position: int) -> int:
        """Returns where the sample at a position of an epoch of a set stands in the global batch."""
        order = self.sets[set_number]
        row, lane = divmod(position % order.global_batch, order.lanes)
        return row * self.lanes + sum(before.lanes for before in self.sets[:set_number]) + lane


def lanes_of_sets(weights: dict[str, float], lanes: int) -> list[int]:
    """Divides lanes among the sets of a mixture.

    Args:
        weights: The weight of each set, by its folder.
        lanes: Lanes of all sets together.

    Returns:
        The lanes of each set, in the order of `weights`.

    Raises:
        Refused: The weights do not come out even.
    """
    total = sum(weights.values())
    exact = [lanes * weight / total for weight in weights.values()]
    nearest = [round(share) for share in exact]
    if min(nearest) >= 1 and all(math.isclose(*pair, rel_tol=1e-9) for pair in zip(exact, nearest, strict=True)):
        return nearest
    if len(weights) > lanes:
        raise Refused(f"data.lanes: {lanes} lanes are too few for the {len(weights)} sets of data.mixture; use more")
    nearest = [1] * len(exact)
    for _ in range(lanes - len(exact)):
        behind = max(range(len(exact)), key=lambda number: exact[number] - nearest[number])
        nearest[behind] += 1
    remedy = ", ".join(f"{name}: {share}" for name, share in zip(weights, nearest, strict=True))
    given = ", ".join(f"{weight:g}" for weight in weights.values())
    raise Refused(
        f"data.mixture: the weights {given} do not give each set whole lanes of data.lanes {lanes}; use {remedy}, "
        f"or other data.lanes"
    )


def refuse_uneven(samples: int, lanes: int, global_batch: int) -> None:
    """Raises `Refused` if lanes do not divide the batch or a set has no whole step, naming the nearest that works."""
    if global_batch % lanes:
        raise Refused(
            f"data.lanes: {lanes} lanes do not divide data.global_batch {global_batch}; "
            f"use {nearest_divisor(global_batch, lanes)}"
        )
    if samples < global_batch:
        raise Refused(
            f"data.global_batch: {global_batch} is more than the {samples} samples of the shards; "
            f"use at most {samples} or add samples"
        )


def stretch_of_rank(global_batch: int, lanes: int, world: int, rank: int) -> tuple[int, int]:
    """Returns where a rank's samples begin and end in rank order; raises `Refused` if `world` does not divide them."""
    if global_batch % world:
        raise Refused(
            f"data.global_batch: {global_batch} samples do not divide among {world} processes; "
            f"use {nearest_multiple(global_batch, world, lanes)}"
        )
    per_rank = global_batch // world
    return rank * per_rank, (rank + 1) * per_rank


def places_in_rank_order(global_batch: int, lanes: int) -> np.ndarray:
    """Returns `(global_batch,)` places of the global batch in rank order, which groups them by lane."""
    return np.arange(global_batch).reshape(-1, lanes).T.ravel()


class _LaneEpoch:
    """The order of one lane in one epoch, shuffled shard window by shard window as it is read."""

    def __init__(self, order: Order, epoch: int, lane: int) -> None:
        self.epoch = epoch
        self._key_parts = (order.seed, epoch, lane)
        self._pieces_per_window = order.shards_per_window
        pieces = order.lane_pieces[lane]
        self._pieces = [pieces[piece] for piece in permutation(key_for(*self._key_parts, "lane"), len(pieces))]
        ends = itertools.accumulate(map(len, self._pieces))
        self._starts = [0, *ends][:: self._pieces_per_window]
        self._kept: tuple[int, np.ndarray] | None = None

    def rows(self, first: int, end: int) -> np.ndarray:
        """Returns `(end - first,)` sample numbers, those that the lane reads from `first` on."""
        number = bisect.bisect_right(self._starts, first) - 1
        parts = []
        while first < end:
            start, members = self._starts[number], self._window(number)
            parts.append(members[first - start : end - start])
            first = start + len(members)
            number += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _window(self, number: int) -> np.ndarray:
        if self._kept is None or self._kept[0] != number:
            first = number * self._pieces_per_window
            pieces = self._pieces[first : first + self._pieces_per_window]
            members = np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces])
            shuffled = members[permutation(key_for(*self._key_parts, number, "window"), len(members))]
            self._kept = number, shuffled
        return self._kept[1]


def evaluation_slice(samples: int, world: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Divides `samples` among ranks so that each is counted once and all ranks take equally many steps.

    Returns:
        `(n,)` sample numbers, the same n on every rank, and `(n,)` booleans: False marks a filler that must not count.
    """
    per_rank = -(-samples // world)
    numbers = np.arange(rank * per_rank, (rank + 1) * per_rank)
    return np.minimum(numbers, samples - 1), numbers < samples


def evaluation_groups(samples: int, group: int, world: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Deals groups of consecutive samples to ranks in turn, so that which samples meet in one does not tell the world.

    The last group is smaller where `group` does not divide `samples`; the ranks that come after it in its round get it
    again, uncounted, so that all take equally many steps.

    Returns:
        `(n,)` sample numbers, to be cut into stretches of `group`, and `(n,)` booleans: False marks a filler that must
        not count.
    """
    last = max(-(-samples // group) - 1, 0)
    dealt = np.arange(rank, (last // world + 1) * world, world)
    parts = [np.arange(samples)[first * group :][:group] for first in np.minimum(dealt, last)]
    return np.concatenate(parts), np.repeat(dealt <= last, [len(part) for part in parts])


def nearest_divisor(number: int, wanted: int) -> int:
    """Returns the divisor of `number` that is nearest to `wanted`."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


def nearest_multiple(number: int, *factors: int) -> int:
    """Returns the positive common multiple of `factors` that is nearest to `number`."""
    factor = math.lcm(*factors)
    return max(round(number / factor), 1) * factor
