"""Training on a real SLURM: whatever ends an attempt, the run ends by itself in the weights of the undisturbed one."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cluster.jobs import TWO_NODES, Job, jobs_of, newest_step, steps_logged
from tests.cluster.slurm_cluster import wait_until
from tests.runs import ROOT, own_environment

STEPS = 100
STARTED_S = 240


def arguments(recipe: Path, out: Path, steps: int = STEPS, every: int = 10) -> list[object]:
    """A run of half a minute: its batches are what takes the time."""
    sizes = ["--data.global_batch", 8, "--data.micro_batch", 1, "--data.repeats", 4]
    return [
        *("--config", recipe, "--out", out, "--deepspeed", "zero2", "--steps", steps),
        *("--checkpoint.every", every, "--seed", 5, *sizes),
    ]


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory) -> Path:
    """The run in two processes under torchrun."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pretrain"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *map(str, arguments(recipe, out))],
        cwd=ROOT,
        env=own_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out


def assert_same_run(out: Path, expected: Path) -> None:
    weights, wanted = (load_file(folder / "encoder" / "model.safetensors") for folder in (out, expected))
    assert weights.keys() == wanted.keys()
    assert all((value == wanted[name]).all() for name, value in weights.items())
    assert steps_logged(out) == steps_logged(expected) == list(range(1, STEPS + 1))


def test_a_script_by_hand_and_tubelet_launch_slurm_train_on_two_nodes_as_torchrun_does(
    cluster, submit, launch, recipe, undisturbed, tmp_path
):
    """Both at once on the same nodes, so their ports must differ; no node's name resolves."""
    by_hand = submit(*TWO_NODES, "slurm/pretrain.sbatch", *arguments(recipe, tmp_path / "by-hand"))
    options = ["--nodes", 2, "--gpus", 0, "--cpus", 1, "--time", 10, "--partition", "low"]
    code, said = launch(*options, "--", "pretrain", *arguments(recipe, tmp_path / "launched"))
    assert code == 0, said
    (launched,) = jobs_of(cluster, tmp_path, said)
    for job in (by_hand, launched):
        assert job.wait() == "COMPLETED", job.text
    for name in ("by-hand", "launched"):
        assert_same_run(tmp_path / name, undisturbed)


def requeue(job: Job) -> None:
    job.cluster.ask("scontrol", "requeue", job.number)


def signal_tasks(job: Job) -> None:
    job.cluster.ask("scancel", "--signal=USR2", job.number)


def kill_rank_1(job: Job) -> None:
    os.kill(job.rank(1).pid, signal.SIGKILL)


def lose_node_2(job: Job) -> None:
    job.cluster.lose_node("node2")
    wait_until(lambda: job.shown("Restarts") != "0", 120, "the job is requeued")
    job.cluster.start_node("node2")


def preempt(job: Job) -> None:
    urgent = ("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    job.cluster.ask(*urgent, "--wrap", "sleep 1")


def reach_time_limit(job: Job) -> None:
    """Moves the limit to the next full minute, whose warning of 60 s is due; the next attempt has time again.

    SLURM looks at limits each half a minute, in which the run would end: the ranks stand still until the warning.
    """
    for rank in (0, 1):
        os.kill(job.rank(rank).pid, signal.SIGSTOP)
    hours, minutes, _ = job.shown("RunTime").split(":")
    limit = ("scontrol", "update", f"JobId={job.number}")
    job.cluster.ask(*limit, f"TimeLimit={60 * int(hours) + int(minutes) + 1}")
    wait_until(lambda: job.shown("Restarts") == "1", 120, "the job is requeued at its limit")
    job.cluster.ask(*limit, "TimeLimit=60")


def stop_rank_1(job: Job) -> None:
    os.kill(job.rank(1).pid, signal.SIGSTOP)


@pytest.mark.parametrize(
    "disturb", [requeue, signal_tasks, kill_rank_1, lose_node_2, preempt, reach_time_limit, stop_rank_1]
)
def test_a_run_goes_on_by_itself_to_the_same_weights_after(submit, recipe, undisturbed, tmp_path, disturb):
    out = tmp_path / "run"
    limits = ("--time=60", "--signal=USR2@60")
    hang = ["--stopping.hang_limit_s", 20] if disturb is stop_rank_1 else []
    job = submit(*limits, *TWO_NODES, "slurm/pretrain.sbatch", *arguments(recipe, out), *hang)
    wait_until(lambda: newest_step(out) >= 20 or job.shown("JobState") == "COMPLETED", STARTED_S, "step 20")
    disturb(job)
    assert job.wait() == "COMPLETED", job.text
    assert job.shown("Restarts") in ("1", "2"), job.text  # the second where SLURM has not yet missed the lost node
    resumed = int(re.search(r"going on from step (\d+)", job.text)[1])
    assert 20 <= resumed < STEPS
    if disturb in (signal_tasks, preempt, reach_time_limit):
        assert "exit code 75; requeueing" in job.text
    assert_same_run(out, undisturbed)
