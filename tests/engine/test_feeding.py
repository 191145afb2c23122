"""Batches reach the device as they are; on a GPU one is taken ahead, which changes nothing of what is trained on.

The GPU's own part, streams and events, is checked by `tests/benchmarks/feeding.py` where there is one.
"""

from collections.abc import Iterator

import pytest
import torch

from pretrain.data.loader import Batch
from pretrain.engine.feeding import on_device, one_ahead
from pretrain.errors import StoppedByRule


class Source:
    """Counts from 0 on, and how many numbers were taken."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count, self.error, self.taken = count, error, 0

    def __iter__(self) -> Iterator[int]:
        for number in range(self.count):
            self.taken += 1
            yield number
        if self.error:
            raise self.error


def batch_of(number: int) -> Batch:
    clips = torch.full((2, 4, 8, 8, 3), number, dtype=torch.uint8)
    tokens = torch.full((2, 1), number)
    return Batch(clips, tokens[:, 0], tokens, tokens, keys=[str(number)], padded=number, skipped=[{"key": "bad"}])


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_one_ahead_yields_all_in_order_and_takes_one_more_than_it_yields(count):
    source = Source(count)
    for number, yielded in enumerate(one_ahead(source)):
        assert yielded == number
        assert source.taken == min(number + 2, count)
    assert source.taken == count


def test_nothing_is_taken_before_the_first_batch_is_asked_for():
    source = Source(3)
    one_ahead(source)
    assert source.taken == 0


def test_what_taking_a_batch_ahead_raises_is_raised_only_when_that_batch_is_asked_for():
    """A run that cannot read the samples of step 3 still makes step 2, and records it."""
    ahead = one_ahead(Source(2, StoppedByRule("no substitute")))
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(StoppedByRule, match="no substitute"):
        next(ahead)


def test_an_error_of_the_first_batch_is_raised_at_once():
    with pytest.raises(StoppedByRule):
        next(one_ahead(Source(0, StoppedByRule("no substitute"))))


def test_on_the_cpu_batches_pass_through_untouched_and_none_is_taken_ahead():
    source = Source(3)
    batches = [batch_of(number) for number in range(3)]
    fed = on_device((batches[number] for number in source), torch.device("cpu"))
    for number, batch in enumerate(fed):
        assert source.taken == number + 1
        assert (batch.keys, batch.padded, batch.skipped) == ([str(number)], number, [{"key": "bad"}])
        for name in ("clips", "labels", "visible", "masked"):
            assert getattr(batch, name) is getattr(batches[number], name), "no copy is made"


def test_tensors_move_to_the_device_and_the_rest_stays():
    batch = next(iter(on_device([batch_of(1)], torch.device("meta"))))
    assert {getattr(batch, name).device.type for name in ("clips", "labels", "visible", "masked")} == {"meta"}
    assert (batch.keys, batch.padded) == (["1"], 1)
