"""Processes: what they tell each other, and that all ranks together read what one would."""

import pytest
import torch

from pretrain.data.loader import MicroBatches
from pretrain.data.order import Order
from pretrain.engine.distributed import Processes, launched_world, started_as_main
from pretrain.errors import Refused, TubeletError

ORDER = Order((5, 7, 3, 9), seed=4, lanes=4, shards_per_window=2, global_batch=8)


@pytest.mark.parametrize(("world", "micro_batch"), [(2, 2), (2, 1), (4, 2), (8, 1)])
def test_all_ranks_together_read_the_samples_of_one_process_in_the_same_places(world, micro_batch):
    for step in range(2 * ORDER.steps_per_epoch):
        whole = ORDER.step(step)
        expected = dict(zip(whole.places.tolist(), zip(whole.positions, whole.samples, strict=True), strict=True))
        found = {}
        for rank in range(world):
            part = ORDER.step(step, world, rank)
            requests = [
                request
                for batch in MicroBatches(ORDER, range(step, step + 1), micro_batch, world, rank)
                for request in batch
            ]
            assert [(request.position, request.sample) for request in requests] == list(
                zip(part.positions, part.samples, strict=True)
            )
            assert all(request.epoch == whole.epoch for request in requests)
            found |= dict(zip(part.places.tolist(), zip(part.positions, part.samples, strict=True), strict=True))
        assert found == expected


def test_a_process_alone_gathers_its_own_values_and_passes_errors_on():
    with Processes() as processes:
        assert (processes.world, processes.rank, processes.is_main) == (1, 0, True)
        values = torch.tensor([1.0, 2.0], dtype=torch.float64)
        assert torch.equal(processes.gather(values), values[None])
        assert processes.gather_objects("a") == ["a"]
        assert processes.on_main(lambda: 7) == 7

        def fail() -> None:
            raise Refused("no")

        with pytest.raises(Refused, match="no"):
            processes.on_main(fail)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine's GPU can compute in fp16")
def test_fp16_without_a_gpu_is_refused():
    with pytest.raises(Refused, match="precision: fp16 needs a GPU; use bf16 or fp32"):
        Processes("fp16")


def test_the_launchers_variables_tell_the_world_and_the_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (launched_world(), started_as_main()) == (1, True)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (launched_world(), started_as_main()) == (8, False)


def test_an_accelerate_that_believes_in_another_world_than_the_launcher_is_caught(monkeypatch):
    with Processes():
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(TubeletError, match="accelerate believes in 1 processes, but the launcher started 2"):
            Processes()
