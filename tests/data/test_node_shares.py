"""A node reads its share of the shards and little more, so that its cache of remote ones stays warm."""

import itertools

import numpy as np
import pytest

from tests.benchmarks.order_scale import (
    GLOBAL_BATCH,
    LANES,
    SAMPLES_PER_SHARD,
    SHARDS,
    shards_read,
    simulated_order,
)


@pytest.mark.parametrize("nodes", [1, 4, 16, 64])
def test_a_node_reads_its_share_of_shards_of_many_sizes(nodes):
    """The benchmark of the same name in small; what it counts is what the steps read."""
    order = simulated_order(shards=1600, samples_per_shard=10, lanes=64, global_batch=128)
    counted = shards_read(order, (nodes,))[nodes]
    shards = np.repeat(np.arange(len(order.samples_per_shard)), order.samples_per_shard)
    for node in (0, nodes - 1):
        steps = [order.step(step, nodes, node).samples for step in range(order.steps_per_epoch)]
        assert len(set(shards[np.concatenate(steps)].tolist())) == counted[node]
    assert max(counted) <= 1.1 / nodes * len(order.samples_per_shard) + 2


@pytest.mark.parametrize("nodes", [1, 8, 64, 1024])
def test_a_node_has_its_share_of_20000_shards_with_10_million_samples(nodes):
    """What its lanes hold, and so what it reads in any epoch."""
    order = simulated_order(SHARDS, SAMPLES_PER_SHARD, LANES, GLOBAL_BATCH)
    assert (order.samples, len(order.samples_per_shard), order.lanes % nodes) == (10_000_000, 20_000, 0)
    ends = np.cumsum(order.samples_per_shard)
    lanes = order.lanes // nodes
    for node in range(nodes):
        pieces = itertools.chain(*order.lane_pieces[node * lanes : (node + 1) * lanes])
        held = np.unique(np.searchsorted(ends, [piece.start for piece in pieces], side="right"))
        assert len(held) <= 1.1 / nodes * len(ends) + 2
