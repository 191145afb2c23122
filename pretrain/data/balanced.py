"""The order of samples where classes are unequal: each step and each epoch holds every class in a share that is set.

It is `order.py` for a labelled set whose rare classes shall be seen more often, and as pure: which sample stands where
follows from a few integers, whatever the world, the workers and the interruptions.

    share    of a class: its samples to a power, over the sum of all classes. 1 is the set as stored, 0.5 square-root
             sampling (Mahajan et al., 2018, arXiv 1805.00932), 0 all classes alike; Kang et al. (2020, arXiv
             1910.09217) compare them
    epoch    as many steps as the set fills; its places stand in a line, class after class, each with its share of them
    step     takes every n-th place of that line, where n is the number of steps, and shuffles what it took
    turn     the samples of a class take turns: round after round over all of them, each round in another order

So a class has its share of every step and of every epoch, rounded down or up, and a sample comes again only in the next
round of its class, even if that begins in another epoch. Samples are not bound to lanes: every node reads every shard.
"""

import dataclasses
import decimal
import functools
import itertools
import math

import numpy as np

from pretrain.data.order import Mixture, Order, Slice, places_in_rank_order, refuse_uneven, stretch_of_rank
from pretrain.data.randomness import key_for, permutation

UNIT_BITS = 32
UNIT = 1 << UNIT_BITS
"""Parts of a place in which shares are counted: integers are rounded alike on every machine."""
GOLDEN = 2654435769  # UNIT over the golden ratio: its multiples fall evenly into 0 .. UNIT


@dataclasses.dataclass(frozen=True)
class BalancedOrder:
    """The order of a whole run over one labelled set, with every class in its share.

    Attributes:
        labels: The class of each sample, in the order of sample numbers; a class without samples has no share.
        seed: Seed of every shuffle.
        lanes: Divides `global_batch`; only says which places a rank reads, as in `Order`.
        global_batch: Samples in one step over all ranks.
        power: A class's share grows with its samples to this power, from 0 to 1.
    """

    labels: tuple[int, ...]
    seed: int
    lanes: int
    global_batch: int
    power: float

    def __post_init__(self) -> None:
        """Refuses what would not come out even, naming the nearest that does."""
        refuse_uneven(self.samples, self.lanes, self.global_batch)

    @property
    def samples(self) -> int:
        """Samples in the set."""
        return len(self.labels)

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps that read as many samples as the set holds, of which some come more than once and some never."""
        return self.samples // self.global_batch

    @functools.cached_property
    def classes(self) -> dict[int, np.ndarray]:
        """The sample numbers of each class that has samples, by class number, ascending."""
        labels = np.asarray(self.labels)
        numbers, counts = np.unique(labels, return_counts=True)
        members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        return dict(zip(numbers.tolist(), members, strict=True))

    def shares(self) -> dict[int, float]:
        """Returns the share of each class that has samples in the places of a step, by class number; they sum to 1."""
        weights = self._weights()
        return {number: weight / sum(weights) for number, weight in zip(self.classes, weights, strict=True)}

    def step(self, step: int, world: int = 1, rank: int = 0) -> Slice:
        """Returns what `rank` of `world` reads in step `step` of the run.

        Raises:
            Refused: `world` does not divide `global_batch`.
        """
        first, end = stretch_of_rank(self.global_batch, self.lanes, world, rank)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        places = places_in_rank_order(self.global_batch, self.lanes)[first:end]
        classes, turns = self._epoch(epoch).turns_of_step(step_in_epoch)
        read = permutation(key_for(self.seed, epoch, step_in_epoch, "step"), self.global_batch)[places]
        samples = self._samples_of(classes[read], turns[read])
        return Slice(epoch, places, step_in_epoch * self.global_batch + places, samples)

    def parts(self, step: int, world: int = 1, rank: int = 0) -> list[tuple[int, Slice]]:
        """Returns what `Mixture.parts` does, of a single set."""
        return [(0, self.step(step, world, rank))]

    def place(self, set_number: int, position: int) -> int:
        """Returns where the sample at a position of an epoch stands in the global batch."""
        return position % self.global_batch

    def _weights(self) -> list[int]:
        """A number for each class that its share grows with; decimals, unlike floats, are alike on every machine."""
        context = decimal.Context(prec=28)
        power = decimal.Decimal(str(self.power))
        return [int(context.power(len(members), power).scaleb(12, context)) for members in self.classes.values()]

    @functools.cached_property
    def _edges(self) -> np.ndarray:
        """`(classes + 1,)` where each class begins in the line of an epoch's places, and its end, in parts of one."""
        sums = list(itertools.accumulate(self._weights(), initial=0))
        places = self.steps_per_epoch * self.global_batch
        return np.array([places * UNIT * before // sums[-1] for before in sums])

    def _epoch(self, epoch: int) -> "_BalancedEpoch":
        if epoch not in self._epochs:
            self._epochs.clear()
            self._epochs[epoch] = _BalancedEpoch(self, epoch, self._edges)
        return self._epochs[epoch]

    @functools.cached_property
    def _epochs(self) -> "dict[int, _BalancedEpoch]":
        return {}

    def _samples_of(self, classes: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """Returns `(n,)` sample numbers: of each class, by its place among those that have samples, the n-th turn."""
        rounds, rows = np.divmod(turns, np.array([len(members) for members in self.classes.values()])[classes])
        grouped = np.lexsort((rounds, classes))
        changes = np.diff(classes[grouped]).astype(bool) | np.diff(rounds[grouped]).astype(bool)
        numbers = list(self.classes)
        samples = np.empty(len(classes), dtype=np.int64)
        for group in np.split(grouped, np.flatnonzero(changes) + 1):
            in_turn = self._round(numbers[classes[group[0]]], int(rounds[group[0]]))
            samples[group] = in_turn[rows[group]]
        return samples

    def _round(self, number: int, round_number: int) -> np.ndarray:
        """Returns the sample numbers of a class in the order of one of its rounds."""
        kept = self._rounds.get(number)
        if kept is None or kept[0] != round_number:
            members = self.classes[number]
            key = key_for(self.seed, number, round_number, "class")
            kept = self._rounds[number] = round_number, members[permutation(key, len(members))]
        return kept[1]

    @functools.cached_property
    def _rounds(self) -> dict[int, tuple[int, np.ndarray]]:
        return {}


SampleOrder = Order | Mixture | BalancedOrder
"""What tells which sample stands where in the steps of a run."""


class _BalancedEpoch:
    """Which classes stand in the steps of one epoch, and how many places each class had before."""

    def __init__(self, order: BalancedOrder, epoch: int, edges: np.ndarray) -> None:
        self._steps = order.steps_per_epoch
        self._global_batch = order.global_batch
        # The rounding is shifted in each epoch, so that what a class misses in one it gets in another.
        starts = (key_for(order.seed, "shares") % UNIT + np.arange(epoch + 1) * GOLDEN) % UNIT
        self._line = (edges + int(starts[-1])) >> UNIT_BITS
        rounded_up = epoch - np.searchsorted(np.sort(starts[:-1]), UNIT - (edges & (UNIT - 1)))
        self._before = np.diff(epoch * (edges >> UNIT_BITS) + rounded_up)
        # Steps are taken out of the line in strides, so that those near in time are far apart in the line.
        stride = next(n for n in itertools.count(round(self._steps * GOLDEN / UNIT)) if math.gcd(n, self._steps) == 1)
        self._first_places = np.arange(self._steps) * stride % self._steps

    def turns_of_step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns `(global_batch,)` classes, ascending, and of each place which turn of its class in the run it is."""
        in_line = self._first_places[step] + self._steps * np.arange(self._global_batch)
        classes = np.searchsorted(self._line, in_line, side="right") - 1
        whole, left = np.divmod(self._line, self._steps)
        taken = np.diff(step * whole + np.searchsorted(np.sort(self._first_places[:step]), left))
        turns_in_step = np.arange(self._global_batch) - np.searchsorted(classes, classes)
        return classes, (self._before + taken)[classes] + turns_in_step
