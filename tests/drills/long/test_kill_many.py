"""Kills between two file operations of a checkpoint, many in one run; `make drill` makes hundreds of them."""

import random

from tests.drills.kill_many import drill
from tests.runs import tiny_pretraining


def test_a_run_killed_again_and_again_inside_its_saves_ends_in_the_very_same_weights(packed_shards, tmp_path):
    tally = drill(tiny_pretraining(tmp_path, packed_shards), tmp_path, "one-process", 6, random.Random())
    assert tally.failures == []
    assert (tally.kills, tally.identical) == (6, tally.runs)
