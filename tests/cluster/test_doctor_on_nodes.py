"""`tubelet doctor` and the preflight of a run on two nodes of a real SLURM: both are named, or the bad one alone."""

import sys
from pathlib import Path

import pytest

from launch.doctor_checks import CHECKS
from tests.cluster.jobs import TWO_NODES, jobs_of
from tests.engine.test_preflight import other_timm
from tests.launch.test_doctor import examined

BY_RANK_0 = ("checkpoints", "disk", "W&B")


@pytest.fixture
def python_with_other_timm_on_node2(tmp_path) -> str:
    """Writes what stands for Python in the tasks; returns its file."""
    path = tmp_path / "python.sh"
    other = f"[ $SLURMD_NODENAME = node1 ] || export PYTHONPATH={other_timm(tmp_path)}:$PYTHONPATH"
    path.write_text(f'#!/bin/bash\n{other}\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


def arguments(recipe: Path, out: Path) -> list[object]:
    return ["--config", recipe, "--steps", 6, "--out", out, "--deepspeed", "zero2"]


def test_a_healthy_cluster_passes_every_check_on_both_nodes(cluster, launch, recipe, tmp_path):
    options = ["--nodes", 2, "--gpus", 0, "--cpus", 1]
    code, said = launch(*options, "--", "doctor", *arguments(recipe, tmp_path / "runs" / "a"))
    assert code == 0, said
    (job,) = jobs_of(cluster, tmp_path, said)
    assert job.wait() == "COMPLETED", job.text
    assert "2 processes on node1, node2\n" in job.text
    assert list(examined(job.text)) == list(CHECKS)
    assert "failed" not in job.text
    for name in CHECKS:
        told = " ".join(line for line in job.text.splitlines() if line[13:].startswith(f"{name} "))
        assert "node1" in told
        assert "node2" in told or name in BY_RANK_0
    assert not (tmp_path / "runs").exists()


def test_a_sick_node_is_named_and_the_job_fails_without_another_attempt(
    submit, recipe, tmp_path, python_with_other_timm_on_node2
):
    """The doctor, and a run whose first second finds the same."""
    command = arguments(recipe, tmp_path / "run")
    jobs = [
        submit(*TWO_NODES, f"slurm/{name}.sbatch", *command, TUBELET_PYTHON=python_with_other_timm_on_node2)
        for name in ("doctor", "pretrain")
    ]
    for job in jobs:
        assert job.wait() == "FAILED", job.text
        assert (job.shown("ExitCode"), job.shown("Restarts")) == ("2:0", "0"), job.text
        named = [line for line in job.text.splitlines() if "timm: is " in line]
        assert len(named) == 1, job.text
        assert "on node1 (rank 0), but 9.9 on node2 (rank 1); install the same environment on all nodes" in named[0]
    assert not (tmp_path / "run").exists()
