"""The order of samples: which sample stands where, in every step of a run, as pure functions of a few integers.

Nothing here reads a file or knows a process. Resuming is one integer, and the world or the number of workers may
change in the middle of a run, because neither decides which samples a step holds: they only divide the step's places.

    line     the shards, permuted once by the seed, laid end to end
    lanes    the line cut into equal stretches; a lane keeps its samples for the whole run, so caches stay warm
    epoch    in each lane: its pieces of shards permuted, cut into shard windows, shuffled inside each
    position p of the epoch is sample p div lanes of lane p mod lanes: lanes take turns
    step     takes global_batch positions in a row; place j is the j-th of them
    rank     the places in rank order are grouped by lane, so a rank (and its node) reads few lanes
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from pretrain.data.randomness import key_for, permutation
from pretrain.errors import Refused


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


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of a whole run over one set of shards.

    Attributes:
        samples_per_shard: Samples in each shard, in the order of the shard index.
        seed: Seed of every shuffle.
        lanes: Number of lanes; divides `global_batch`. Stored with the run, never derived from the world.
        shards_per_window: Pieces of shards that are shuffled together.
        global_batch: Samples in one step over all ranks.
    """

    samples_per_shard: tuple[int, ...]
    seed: int
    lanes: int
    shards_per_window: int
    global_batch: int

    def __post_init__(self) -> None:
        """Refuses what would not come out even, naming the nearest that does."""
        if self.global_batch % self.lanes:
            raise Refused(
                f"data.lanes: {self.lanes} lanes do not divide data.global_batch {self.global_batch}; "
                f"use {nearest_divisor(self.global_batch, self.lanes)}"
            )
        if self.samples < self.global_batch:
            raise Refused(
                f"data.global_batch: {self.global_batch} is more than the {self.samples} samples of the shards; "
                f"use at most {self.samples} or add samples"
            )

    @functools.cached_property
    def samples(self) -> int:
        """Samples in the set."""
        return sum(self.samples_per_shard)

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in an epoch; the few positions past them are not read in that epoch."""
        return self.samples // self.global_batch

    @functools.cached_property
    def lane_pieces(self) -> list[list[np.ndarray]]:
        """For each lane its pieces of shards, each an array of sample numbers in the order of the line."""
        starts = np.concatenate([[0], np.cumsum(self.samples_per_shard)])
        shard_order = permutation(key_for(self.seed, "shards"), len(self.samples_per_shard))
        bounds = np.cumsum([0] + [self.samples_in_lane(lane) for lane in range(self.lanes)])
        pieces: list[list[np.ndarray]] = [[] for _ in range(self.lanes)]
        line = 0
        for shard in shard_order:
            numbers = np.arange(starts[shard], starts[shard + 1])
            first_lane = int(np.searchsorted(bounds, line, side="right")) - 1
            for lane in range(max(first_lane, 0), self.lanes):
                low, high = max(bounds[lane] - line, 0), min(bounds[lane + 1] - line, len(numbers))
                if low >= len(numbers):
                    break
                if high > low:
                    pieces[lane].append(numbers[low:high])
            line += len(numbers)
        return pieces

    def samples_in_lane(self, lane: int) -> int:
        """Samples in a lane; lanes differ by one at most."""
        return self.samples // self.lanes + (lane < self.samples % self.lanes)

    def lane_order(self, epoch: int, lane: int) -> np.ndarray:
        """Returns the sample numbers of a lane in the order in which epoch `epoch` reads them."""
        pieces = self.lane_pieces[lane]
        piece_order = permutation(key_for(self.seed, epoch, lane, "lane"), len(pieces))
        shard_windows = []
        for number, start in enumerate(range(0, len(pieces), self.shards_per_window)):
            members = np.concatenate([pieces[piece] for piece in piece_order[start : start + self.shards_per_window]])
            shard_windows.append(members[permutation(key_for(self.seed, epoch, lane, number, "window"), len(members))])
        return np.concatenate(shard_windows) if shard_windows else np.empty(0, dtype=np.int64)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Returns `(samples,)` sample numbers: entry p is the sample at position p of the epoch."""
        return _epoch_order(self, epoch)

    def step(self, step: int, world: int = 1, rank: int = 0) -> Slice:
        """Returns what `rank` of `world` reads in step `step` of the run.

        Raises:
            Refused: `world` does not divide `global_batch`.
        """
        if self.global_batch % world:
            raise Refused(
                f"data.global_batch: {self.global_batch} samples do not divide among {world} processes; "
                f"use {nearest_multiple(self.global_batch, world, self.lanes)}"
            )
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        per_rank = self.global_batch // world
        in_rank_order = np.arange(rank * per_rank, (rank + 1) * per_rank)
        per_lane = self.global_batch // self.lanes
        places = in_rank_order // per_lane + (in_rank_order % per_lane) * self.lanes
        positions = step_in_epoch * self.global_batch + places
        return Slice(epoch, places, positions, self.epoch_order(epoch)[positions])


@functools.lru_cache(maxsize=2)
def _epoch_order(order: Order, epoch: int) -> np.ndarray:
    interleaved = np.empty(order.samples, dtype=np.int64)
    for lane in range(order.lanes):
        interleaved[lane :: order.lanes] = order.lane_order(epoch, lane)
    return interleaved


def evaluation_slice(samples: int, world: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Divides `samples` among ranks so that each is counted once and all ranks take equally many steps.

    Returns:
        `(n,)` sample numbers, the same n on every rank, and `(n,)` booleans: False marks a filler that must not count.
    """
    per_rank = -(-samples // world)
    numbers = np.arange(rank * per_rank, (rank + 1) * per_rank)
    return np.minimum(numbers, samples - 1), numbers < samples


def nearest_divisor(number: int, wanted: int) -> int:
    """Returns the divisor of `number` that is nearest to `wanted`."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


def nearest_multiple(number: int, *factors: int) -> int:
    """Returns the positive common multiple of `factors` that is nearest to `number`."""
    factor = math.lcm(*factors)
    return max(round(number / factor), 1) * factor
