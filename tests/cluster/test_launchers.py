"""python, torchrun, `accelerate launch`, deepspeed and srun start the same training, by its first 20 losses."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.engine.distributed import SRUN_PORTS
from pretrain.engine.tracking import read_metrics
from tests.cluster.jobs import TWO_NODES
from tests.runs import ROOT, free_port, own_environment

STEPS = 20
TORCHRUN = "torch.distributed.run --nproc-per-node 2 --master-port PORT -m"
ACCELERATE = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port PORT -m"
DEEPSPEED = "deepspeed.launcher.runner --num_gpus 2 --master_port PORT --module"
ZERO_2 = ["--deepspeed", "zero2"]


def arguments(recipe: Path, out: Path, *more: object) -> list[str]:
    """A run whose model draws nothing, since what a model draws depends on the rank."""
    sizes = ["--data.global_batch", 8, "--encoder.drop_path", 0, "--steps", STEPS]
    return [str(part) for part in ("--config", recipe, "--out", out, *sizes, *more)]


def losses(out: Path) -> list[float]:
    entries = read_metrics(out / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    return [entry["loss"] for entry in entries]


@pytest.fixture(scope="module")
def expected(recipe, tmp_path_factory) -> list[float]:
    """The losses of one process, which accumulates twice as many micro-batches as each of two."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(["pretrain", *arguments(recipe, out)]) == 0
    return losses(out)


@pytest.mark.parametrize(
    ("launcher", "options"),
    [(TORCHRUN, ZERO_2), (ACCELERATE, []), (DEEPSPEED, ZERO_2)],
    ids=["torchrun", "accelerate-launch", "deepspeed"],
)
def test_what_a_launcher_starts_trains_as_python_alone_does(recipe, expected, tmp_path, launcher, options):
    out = tmp_path / "run"
    command = [sys.executable, "-m", *launcher.replace("PORT", str(free_port())).split(), "pretrain"]
    environment = own_environment() | {"DS_ACCELERATOR": "cpu"}  # deepspeed's launcher counts devices itself
    done = subprocess.run(
        [*command, *arguments(recipe, out, *options)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert '"world": 2' in (out / "summary.json").read_text()
    assert losses(out) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [[], ZERO_2], ids=["plain", "zero2"])
def test_the_tasks_of_srun_on_two_nodes_train_as_python_alone_does(submit, recipe, expected, tmp_path, options):
    out = tmp_path / "run"
    job = submit(*TWO_NODES, "slurm/pretrain.sbatch", *arguments(recipe, out, *options))
    assert job.wait() == "COMPLETED", job.text
    assert '"world": 2' in (out / "summary.json").read_text()
    assert losses(out) == pytest.approx(expected, rel=1e-5)


def test_a_port_that_another_program_has_taken_costs_one_attempt(submit, recipe, expected, tmp_path):
    out = tmp_path / "run"
    job = submit("--hold", *TWO_NODES, "slurm/pretrain.sbatch", *arguments(recipe, out))
    with socket.socket() as taken:
        taken.bind(("", SRUN_PORTS[int(job.number) % len(SRUN_PORTS)]))
        taken.listen()
        job.cluster.ask("scontrol", "release", job.number)
        assert job.wait() == "COMPLETED", job.text
    assert job.shown("Restarts") == "1"
    assert job.text.count("tubelet: MASTER_PORT: ") == 1
    assert losses(out) == pytest.approx(expected, rel=1e-5)
