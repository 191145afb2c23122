"""The order of 10 million samples in 20,000 shards: the time and memory to plan it, and the shards that a node reads.

A run plans no more than it reads: the shard windows of the steps at hand. So resuming anywhere is measured as the first
step after building the order, for one node and for a process that reads all lanes; and the whole epoch, which only
tools list, beside it. Then the same of balanced sampling, for a million samples. Run with `make bench`.
"""

import functools
import resource
import time
from collections.abc import Callable

import numpy as np

from pretrain.data.balanced import BalancedOrder
from pretrain.data.order import Order
from pretrain.data.randomness import key_for, permutation, raw_words

SHARDS, SAMPLES_PER_SHARD, LANES, GLOBAL_BATCH, NODES = 20_000, 500, 1024, 2048, (1, 8, 64, 1024)
CLASSES, SAMPLES_OF_GREATEST_CLASS = 1000, 133_592  # a million samples in all


def simulated_order(shards: int, samples_per_shard: int, lanes: int, global_batch: int, seed: int = 0) -> Order:
    """Returns an order over an even number of shards that differ by up to a fifth from their mean size."""
    spread = samples_per_shard // 5
    more = (raw_words(key_for(seed, "sizes"), shards // 2) % np.uint64(2 * spread + 1)).astype(int) - spread
    sizes = np.stack([samples_per_shard + more, samples_per_shard - more], axis=1).ravel().tolist()
    return Order(tuple(sizes), seed, lanes, 8, global_batch)


def shards_read(order: Order, nodes: tuple[int, ...]) -> dict[int, list[int]]:
    """Returns for each number of nodes how many shards each node reads in the first epoch; they divide the lanes."""
    rows = order.steps_per_epoch * (order.global_batch // order.lanes)
    ends = np.cumsum(order.samples_per_shard)
    by_lane = [
        set(np.searchsorted(ends, order.lane_order(0, lane)[:rows], side="right").tolist())
        for lane in range(order.lanes)
    ]
    counts = {}
    for count in nodes:
        lanes = order.lanes // count
        counts[count] = [len(set().union(*by_lane[node * lanes : (node + 1) * lanes])) for node in range(count)]
    return counts


def simulated_labels(classes: int, of_greatest: int) -> tuple[int, ...]:
    """Returns labels in random order; class n has 1 / (n + 1) as many samples as the greatest."""
    labels = np.repeat(np.arange(classes), np.maximum(of_greatest // np.arange(1, classes + 1), 1))
    return tuple(labels[permutation(key_for("labels"), len(labels))].tolist())


def peak_mib() -> float:
    """Returns the most memory that this process has held so far, with Python and numpy."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(name: str, plan: Callable[[], object]) -> None:
    """Runs `plan` and prints its time and the memory held at most until then."""
    started, started_cpu = time.perf_counter(), time.process_time()
    plan()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    print(f"{name:52s}{seconds:7.3f} s ({cpu_seconds:.3f} s of the CPU), {peak_mib():4.0f} MiB at most")


def main() -> None:
    """Prints times, memory and shards."""
    order = simulated_order(SHARDS, SAMPLES_PER_SHARD, LANES, GLOBAL_BATCH)
    print(f"{order.samples} samples, {SHARDS} shards, {LANES} lanes, batches of {GLOBAL_BATCH}; {peak_mib():.0f} MiB")
    steps = raw_words(key_for("steps"), 3) % np.uint64(order.steps_per_epoch)
    for step in steps.tolist():
        fresh = simulated_order(SHARDS, SAMPLES_PER_SHARD, LANES, GLOBAL_BATCH)
        measured(f"resuming at step {step}, one of 64 processes", functools.partial(fresh.step, step, 64, 7))
        measured(f"resuming at step {step}, a process with all lanes", functools.partial(fresh.step, step))
    kept = range(100)
    measured(f"{len(kept)} steps in a row, a process with all lanes", lambda: [order.step(step) for step in kept])
    measured("the whole epoch", lambda: order.epoch_order(1))
    for nodes, counts in shards_read(order, NODES).items():
        bound = 1.1 / nodes * SHARDS + 2
        share = max(counts) / SHARDS
        print(
            f"{nodes:5d} nodes: a node reads at most {max(counts)} shards ({share:.2%}) an epoch; wanted: {bound:.0f}"
        )
    labels = simulated_labels(CLASSES, SAMPLES_OF_GREATEST_CLASS)
    print(f"{len(labels)} samples in {CLASSES} classes, balanced, batches of {GLOBAL_BATCH}")
    for power in (0.0, 0.5):
        balanced = BalancedOrder(labels, 0, LANES, GLOBAL_BATCH, power)
        measured(f"resuming at step 123456, power {power:g}", functools.partial(balanced.step, 123_456))
        measured("100 steps in a row", functools.partial(read_steps, balanced, range(123_457, 123_557)))


def read_steps(order: BalancedOrder, steps: range) -> None:
    """Reads one step after the other."""
    for step in steps:
        order.step(step)


if __name__ == "__main__":
    main()
