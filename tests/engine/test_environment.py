"""What an attempt runs on is noted: code, versions, hosts, job, command and variables, without secrets."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from pretrain.engine.environment import describe_attempt, describe_code, describe_rank, launcher_of, note_attempt

ROOT = Path(__file__).parents[2]
RANKS = [{"rank": rank, "host": f"node{rank // 2}", "device": "H100", "cpus": 12} for rank in range(4)]


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *command], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "tubelet"
    (folder / "pretrain").mkdir(parents=True)
    (folder / "pretrain" / "__init__.py").write_text("")
    git(tmp_path, "init", "--quiet", "--initial-branch", "idea", str(folder))
    git(folder, "remote", "add", "origin", "https://me:0penSesame@example.org/tubelet")
    git(folder, "add", "pretrain")
    git(folder, "commit", "--quiet", "--message", "first")
    describe_code.cache_clear()
    return folder


def test_a_checkout_is_told_by_its_commit_and_by_what_differs_from_it(checkout):
    code = describe_code(checkout)
    assert (code["commit"], code["branch"]) == (git(checkout, "rev-parse", "HEAD"), "idea")
    assert (code["changed"], code["changes"], code["untracked"]) == (False, [], [])
    (checkout / "pretrain" / "__init__.py").write_text("changed = True\n")
    (checkout / "new.py").write_text("")
    describe_code.cache_clear()
    code = describe_code(checkout)
    assert code["changed"]
    assert code["changes"][0].split() == ["pretrain/__init__.py", "|", "1", "+"]
    assert code["untracked"] == ["new.py"]
    assert "0penSesame" not in json.dumps(code)


def test_an_installed_package_is_told_as_such_even_inside_somebody_elses_repository(checkout):
    installed = checkout / ".venv" / "site-packages"
    shutil.copytree(checkout / "pretrain", installed / "pretrain")
    code = describe_code(installed)
    assert code["source"] == f"installed, not a checkout of git ({installed})"
    assert code["commit"] is None


def test_a_repository_that_git_cannot_read_is_told_with_gits_words(checkout):
    (checkout / ".git" / "HEAD").write_text("nonsense")
    assert "not a git repository" in describe_code(checkout)["source"]


def test_a_git_that_does_not_answer_and_a_folder_that_is_gone_are_left_out_with_one_warning(
    tmp_path, monkeypatch, caplog
):
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 2\n")
    slow.chmod(0o755)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("PATH", str(slow.parent), prepend=os.pathsep)
    monkeypatch.setattr("pretrain.engine.environment.PATIENCE_S", 0.2)
    describe_code.cache_clear()
    started = time.monotonic()
    report = describe_attempt(3, 20, RANKS, {"SLURM_JOB_ID": "7"}, [])
    assert time.monotonic() - started < 1.5
    assert (report["attempt"], report["step"], report["job"]) == (3, 20, "7")
    assert not {"code", "folder"} & report.keys()
    (warning,) = caplog.messages
    assert "cannot tell folder (FileNotFoundError" in warning
    assert "code (TimeoutError no answer within 0.2 s) of this attempt" in warning


def test_hosts_stand_with_their_ranks_and_devices_in_the_order_of_the_ranks():
    hosts = describe_attempt(1, 0, RANKS, {}, [])["hosts"]
    assert hosts == [
        {"host": "node0", "ranks": [0, 1], "devices": ["H100", "H100"], "cpus": [12, 12]},
        {"host": "node1", "ranks": [2, 3], "devices": ["H100", "H100"], "cpus": [12, 12]},
    ]
    own = describe_rank(3, torch.device("cpu"))
    assert own["rank"] == 3
    assert own["device"].endswith(" CPU")


def test_only_variables_that_are_known_to_matter_are_noted_and_none_with_a_secret():
    noted = {"SLURM_JOB_ID": "7", "NCCL_SOCKET_IFNAME": "ib0", "WANDB_MODE": "offline", "MASTER_PORT": "29500"}
    left_out = {
        "MY_LICENCE": "x",
        "WANDB_SERVICE": "3-socket",
        "SLURM_JWT": "eyJ",
        "NCCL_AUTH_TOKEN": "x",
        "RANKS": "1",
    }
    report = describe_attempt(2, 40, RANKS, noted | left_out, [])
    assert report["variables"] == noted
    assert (report["attempt"], report["step"], report["job"], report["world"]) == (2, 40, "7", 4)


def test_neither_the_command_line_nor_a_variable_shows_a_secret():
    key = "0f1e2d3c4b" * 4
    variables = {"WANDB_API_KEY": key, "WANDB_BASE_URL": "https://me:0penSesame@wandb.example.org"}
    command = [
        "python",
        "-m",
        "pretrain",
        "--data.shards",
        "https://me:0penSesame@h/s?sig=s3cr3t",
        "--out",
        f"runs/{key}",
    ]
    report = describe_attempt(1, 0, RANKS, variables, command)
    text = json.dumps(report)
    assert not [secret for secret in (key, "0penSesame", "s3cr3t") if secret in text]
    assert report["command"][:4] == command[:4]
    assert report["variables"] == {"WANDB_BASE_URL": "https://[removed]@wandb.example.org"}


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({}, "python"),
        ({"SLURM_STEP_ID": "0", "WORLD_SIZE": "2"}, "srun"),
        ({"TORCHELASTIC_RUN_ID": "none", "SLURM_STEP_ID": "0"}, "torchrun"),
        ({"TORCHELASTIC_RUN_ID": "none", "ACCELERATE_MIXED_PRECISION": "no"}, "accelerate"),
        ({"CROSS_SIZE": "1", "WORLD_SIZE": "2"}, "deepspeed"),
    ],
)
def test_the_launcher_is_told_by_its_variables(variables, launcher):
    assert launcher_of(variables) == launcher


def test_each_attempt_adds_a_line(tmp_path):
    for attempt in (1, 2, 3):
        note_attempt(tmp_path, {"attempt": attempt})
    lines = (tmp_path / "environment.jsonl").read_text().splitlines()
    assert [json.loads(line)["attempt"] for line in lines] == [1, 2, 3]
