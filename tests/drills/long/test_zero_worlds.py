"""ZeRO 3, which divides the most, continued by another number of real processes; `make drill` runs the whole matrix."""

from tests.drills.zero_worlds import (
    TOLERANCE,
    change_worlds,
    largest_difference_of_losses,
    largest_difference_of_states,
)
from tests.runs import tiny_pretraining


def test_a_run_of_zero_3_goes_on_with_other_processes_as_without_the_change(packed_shards, tmp_path):
    pair = change_worlds(tiny_pretraining(tmp_path, packed_shards), tmp_path, 3, (2, 1))
    assert largest_difference_of_losses(*pair) < TOLERANCE
    assert largest_difference_of_states(*pair, 3) < 1e-3
