"""Processes: what they tell each other, and that all ranks together read what one would."""

import socket
from collections.abc import Iterator

import pytest
import torch

from pretrain.data.loader import MicroBatches
from pretrain.data.order import Order
from pretrain.engine.devices import NETWORK, network_told
from pretrain.engine.distributed import (
    LAUNCHER_VARIABLES,
    Processes,
    address_of,
    first_host,
    launched_rank,
    launched_world,
)
from pretrain.errors import EXIT_FAILED, EXIT_REFUSED, Refused, TubeletError

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


@pytest.fixture
def no_launcher(monkeypatch):
    for name in (*LAUNCHER_VARIABLES, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_the_launchers_variables_tell_the_world_and_the_rank(monkeypatch, no_launcher):
    assert (launched_world(), launched_rank()) == (1, 0)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (launched_world(), launched_rank()) == (8, 3)


def test_the_tasks_of_srun_are_ranks_unless_another_launcher_stands_between(monkeypatch, no_launcher):
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert (launched_world(), launched_rank()) == (1, 0)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert (launched_world(), launched_rank()) == (8, 5)
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    with pytest.raises(Refused, match=r"srun: started several tasks without telling .*; start one torchrun on each"):
        Processes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert (launched_world(), launched_rank()) == (2, 1)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a.example.org,b.example.org", "a.example.org"),
        ("node[03-05,9],other1", "node03"),
        ("gpu-[12]", "gpu-12"),
        ("rack[0-3]node[01,07-09]-ib,x", "rack0node01-ib"),
    ],
)
def test_the_first_host_of_a_list_of_nodes(nodes, first):
    assert first_host(nodes) == first


def test_a_node_that_resolves_is_met_by_its_name_and_one_that_nobody_knows_is_refused(monkeypatch):
    assert address_of("localhost") == "localhost"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Refused, match=r"srun: the first node, node1\.invalid, resolves to no address; set MASTER_ADDR"):
        address_of("node1.invalid")


@pytest.fixture
def taken_port(monkeypatch, no_launcher) -> Iterator[int]:
    """A port on which another program listens, at which the tasks of a job shall meet."""
    told = {"STEP_NUM_TASKS": "2", "PROCID": "0", "LOCALID": "0", "STEP_NODELIST": "localhost", "STEP_ID": "0"}
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in (told | {"JOB_ID": str(port)}).items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        yield port


def test_a_given_port_that_another_program_has_taken_is_refused_by_rank_0(monkeypatch, taken_port):
    monkeypatch.setenv("MASTER_PORT", str(taken_port))
    with pytest.raises(
        Refused, match=rf"MASTER_PORT: {taken_port} on .* cannot be used \(Address already in use\); set it"
    ):
        Processes()


def test_a_port_that_follows_from_the_job_s_number_and_is_taken_fails_so_that_the_next_attempt_takes_another(
    monkeypatch, taken_port
):
    monkeypatch.setattr("pretrain.engine.distributed.SRUN_PORTS", range(taken_port, taken_port + 1))
    with pytest.raises(TubeletError, match=rf"MASTER_PORT: {taken_port} on .*; the job's next attempt takes") as failed:
        Processes()
    assert failed.value.exit_code == EXIT_FAILED


def test_an_accelerate_that_was_told_another_accumulation_is_refused_and_leaves_the_process_usable(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with pytest.raises(Refused, match="makes 2 micro-batches a step, but accelerate was told 3; unset ACCELERATE_GRAD"):
        Processes(accumulation=2)
    with Processes(accumulation=3) as processes:
        assert processes.accelerator.gradient_accumulation_steps == 3


def test_a_deepspeed_file_that_says_nothing_of_zero_divides_nothing(tmp_path):
    (tmp_path / "zero.json").write_text("{}")
    with Processes(deepspeed=tmp_path / "zero.json") as processes:
        assert processes.accelerator.state.deepspeed_plugin.zero_stage == 0


@pytest.mark.parametrize("content", ["{", "[1]", "[]"])
def test_a_deepspeed_file_that_holds_something_else_is_refused_by_name(tmp_path, content):
    path = tmp_path / "zero.json"
    path.write_text(content)
    with pytest.raises(Refused, match=r"zero\.json: is not a DeepSpeed configuration in JSON"):
        Processes(deepspeed=path)


def test_what_one_process_lacks_is_told_when_they_meet(tmp_path):
    with pytest.raises(Refused, match=r"^zero9: is no file$"):
        Processes(problem="zero9: is no file")
    with pytest.raises(Refused, match=r"zero\.json: cannot be read \(No such file or directory\); name a file that"):
        Processes(deepspeed=tmp_path / "zero.json")


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_an_accelerate_that_was_started_with_a_plugin_of_its_own_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(Refused, match=f"{name}: is set, and would divide the work in accelerate's way; unset it"):
        Processes()


def test_an_accelerate_that_believes_in_another_world_than_the_launcher_is_caught(monkeypatch):
    with Processes():
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(TubeletError, match="accelerate believes in 1 processes, but the launcher started 2"):
            Processes()


NCCL_TOLD = """NCCL error in: NCCLUtils.cpp:94, internal error - please report this issue to the NCCL developers
ncclInternalError: Internal check failed.
Last error:
"""


@pytest.mark.parametrize(
    ("reason", "kind", "code"),
    [
        ("Bootstrap : no socket interface found", Refused, EXIT_REFUSED),
        ("socketStartConnect: Connect to 10.0.0.1<29500> failed : Connection refused", TubeletError, EXIT_FAILED),
    ],
)
def test_a_network_that_fails_is_told_by_its_reason_and_is_only_refused_where_starting_again_is_useless(
    reason, kind, code
):
    with pytest.raises(kind) as failed, network_told():
        raise torch.distributed.DistBackendError(NCCL_TOLD + reason)
    assert str(failed.value) == f"network: {reason}; {NETWORK}"
    assert failed.value.exit_code == code


def test_an_error_that_has_nothing_to_do_with_the_network_is_left_as_it_is():
    with pytest.raises(RuntimeError, match="size mismatch"), network_told():
        raise RuntimeError("size mismatch")
