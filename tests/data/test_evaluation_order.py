"""Which samples of an evaluation each rank takes: each once, all ranks in step, in the same company in any world."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import evaluation_groups, evaluation_slice

EXAMPLES = settings(max_examples=40, deadline=None)


@EXAMPLES
@given(st.integers(1, 60), st.integers(1, 9))
def test_evaluation_counts_each_sample_once_and_keeps_ranks_in_step(samples, world):
    slices = [evaluation_slice(samples, world, rank) for rank in range(world)]
    assert sorted(n for numbers, counted in slices for n in numbers[counted].tolist()) == list(range(samples))
    assert {len(numbers) for numbers, _ in slices} == {-(-samples // world)}
    assert all(0 <= n < samples for numbers, _ in slices for n in numbers)


@EXAMPLES
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9))
def test_the_samples_that_meet_in_an_evaluation_do_not_depend_on_the_world(samples, group, world):
    met = []
    for rank in range(world):
        numbers, counted = evaluation_groups(samples, group, world, rank)
        cuts = range(group, len(numbers), group)
        met.append(list(zip(np.split(numbers, cuts), np.split(counted, cuts), strict=True)))
    assert len({len(groups) for groups in met}) == 1, "all ranks take as many steps"
    in_turn = [one for round_of_groups in zip(*met, strict=True) for one in round_of_groups]
    kept = [numbers.tolist() for numbers, counted in in_turn if counted.all()]
    assert kept == [list(range(samples))[first : first + group] for first in range(0, samples, group)]
    assert all(not counted.any() for _, counted in in_turn[len(kept) :])
