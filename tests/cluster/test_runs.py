"""Training on a real SLURM: whatever ends an attempt, the run ends by itself in the weights of the undisturbed one.

With `--matrix` every disturbance meets every ZeRO stage; without, ZeRO 2 meets all of them and each other stage two.
"""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cluster import disturbances
from tests.cluster.disturbances import DISTURBANCES, SAVING, WARNING_S, Disturbance, stop_rank_1
from tests.cluster.jobs import TWO_NODES, jobs_of, newest_step, steps_logged
from tests.cluster.slurm_cluster import wait_until
from tests.runs import ROOT, own_environment
from tests.wandb_server import wandb_history

STAGES = (0, 1, 2, 3)
SAMPLE: dict[int, tuple[Disturbance, ...]] = {
    0: (disturbances.requeue, disturbances.kill_rank_1),
    1: (disturbances.preempt, disturbances.stop_rank_1),
    2: DISTURBANCES,
    3: (disturbances.signal_tasks, disturbances.lose_node_2),
}
STEPS = 100
STARTED_S = 600
OFFLINE = {"WANDB_MODE": "offline"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "disturb" in metafunc.fixturenames:
        met = dict.fromkeys(STAGES, DISTURBANCES) if metafunc.config.getoption("--matrix") else SAMPLE
        pairs = [(stage, disturb) for stage in STAGES for disturb in met[stage]]
        metafunc.parametrize(("stage", "disturb"), pairs, ids=[f"zero{stage}-{one.__name__}" for stage, one in pairs])


def arguments(recipe: Path, out: Path, stage: int = 2) -> list[object]:
    """A run of some seconds: its batches are what takes the time."""
    sizes = ["--data.global_batch", 8, "--data.micro_batch", 1, "--data.repeats", 4]
    return [
        *("--config", recipe, "--out", out, "--deepspeed", f"zero{stage}", "--steps", STEPS),
        *("--checkpoint.every", 10, "--seed", 5, "--tracking", "wandb", *sizes),
    ]


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory) -> Callable[[int], Path]:
    """Returns the run of a ZeRO stage in two processes under torchrun."""

    @functools.cache
    def trained(stage: int) -> Path:
        out = tmp_path_factory.mktemp("undisturbed") / "run"
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pretrain"]
        done = subprocess.run(
            [sys.executable, "-m", *command, *map(str, arguments(recipe, out, stage))],
            cwd=ROOT,
            env=own_environment() | OFFLINE,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return out

    return trained


def assert_same_run(out: Path, expected: Path) -> int:
    """Compares weights to the bit, and looks for each step in the record and for one W&B run in all attempts.

    Returns:
        How many attempts have come as far as to open it.
    """
    weights, wanted = (load_file(folder / "encoder" / "model.safetensors") for folder in (out, expected))
    assert weights.keys() == wanted.keys()
    assert all((value == wanted[name]).all() for name, value in weights.items())
    steps = list(range(1, STEPS + 1))
    assert steps_logged(out) == steps_logged(expected) == steps
    mirrors = [path.name.rpartition("-")[2] for path in (out / "wandb").glob("offline-run-*")]
    manifest = json.loads((out / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())
    assert set(mirrors) == {manifest["state"]["run_id"]}
    assert {row["step"] for row in wandb_history(out)} == set(steps)
    return len(mirrors)


def test_a_script_by_hand_and_tubelet_launch_slurm_train_on_two_nodes_as_torchrun_does(
    cluster, submit, launch, recipe, undisturbed, tmp_path, monkeypatch
):
    """Both at once on the same nodes, so their ports must differ; no node's name resolves."""
    by_hand = submit(*TWO_NODES, "slurm/pretrain.sbatch", *arguments(recipe, tmp_path / "by-hand"), **OFFLINE)
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ["--nodes", 2, "--gpus", 0, "--cpus", 1, "--time", 10, "--partition", "low"]
    code, said = launch(*options, "--", "pretrain", *arguments(recipe, tmp_path / "launched"))
    assert code == 0, said
    (launched,) = jobs_of(cluster, tmp_path, said)
    for job in (by_hand, launched):
        assert job.wait() == "COMPLETED", job.text
    for name in ("by-hand", "launched"):
        assert assert_same_run(tmp_path / name, undisturbed(2)) == 1


def test_a_run_goes_on_by_itself_to_the_same_weights_after(submit, recipe, undisturbed, tmp_path, stage, disturb):
    out = tmp_path / "run"
    limits = ("--time=60", f"--signal=USR2@{WARNING_S}")
    hang = ["--stopping.hang_limit_s", 20] if disturb is stop_rank_1 else []
    job = submit(*limits, *TWO_NODES, "slurm/pretrain.sbatch", *arguments(recipe, out, stage), *hang, **OFFLINE)
    wait_until(lambda: newest_step(out) >= 20 or job.is_over, STARTED_S, "step 20")
    assert newest_step(out) >= 20, job.text
    disturb(job)
    assert job.wait() == "COMPLETED", job.text
    restarts = int(job.shown("Restarts"))
    assert restarts in (1, 2), job.text  # the second where SLURM has not yet missed the lost node
    resumed = int(re.search(r"going on from step (\d+)", job.text)[1])
    assert 20 <= resumed < STEPS
    if disturb in SAVING:
        assert "exit code 75; requeueing" in job.text
    if disturb is stop_rank_1:
        assert "trainer.py" in (out / "stacks" / "rank-0.txt").read_text()
    # An attempt leaves no folder where W&B's own process was killed, or ended by SLURM's TERM, before it wrote one.
    assert 1 <= assert_same_run(out, undisturbed(stage)) <= 1 + restarts
