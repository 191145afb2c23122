"""Saving and loading checkpoints: committed by a rename, pruned afterwards, and only by the run's owner."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.engine.checkpoint import CheckpointConfig, Checkpoints, find_checkpoint, step_folders, verify
from pretrain.engine.distributed import Processes
from pretrain.engine.ownership import RunLock
from pretrain.errors import Refused, StoppedByRule, TubeletError

STATE = {"engine": {"name": "plain data parallelism", "world": "any number of"}, "identity": {"seed": 0}}


@pytest.fixture
def processes():
    with Processes() as opened:
        yield opened


def trained(processes: Processes, seed: int, width: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(width, 2)
    model, optimizer = processes.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return model, optimizer


def opened(out: Path, processes: Processes, keep_last: int = 2) -> Checkpoints:
    return Checkpoints(out / "checkpoints", processes, RunLock(out), keep_last)


def test_what_is_saved_is_what_is_loaded(tmp_path, processes):
    model, optimizer = trained(processes, seed=0)
    checkpoints = opened(tmp_path, processes)
    checkpoints.save(7, model, optimizer, STATE)
    saved = find_checkpoint(checkpoints.folder, "auto")
    assert (saved.step, saved.state) == (7, STATE)
    other, other_optimizer = trained(processes, seed=1)
    checkpoints.load(saved, other, other_optimizer)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in model.state_dict().items())
    assert torch.equal(
        other_optimizer.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"]
    )


def test_the_newest_stay_and_a_manifest_names_every_file_with_size_and_hash(tmp_path, processes):
    checkpoints = opened(tmp_path, processes, keep_last=2)
    for step in (5, 10, 100):
        checkpoints.save(step, *trained(processes, seed=step), STATE)
    folders = step_folders(checkpoints.folder)
    assert [folder.name for folder in folders] == ["step-00000010", "step-00000100"]
    manifest = json.loads((folders[-1] / "manifest.json").read_text())
    assert manifest["step"] == 100
    files = {path.name: path.stat().st_size for path in folders[-1].iterdir() if path.name != "manifest.json"}
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == files
    assert not list(checkpoints.folder.glob("*.tmp-*"))


def test_a_step_may_be_saved_again_over_a_damaged_folder(tmp_path, processes):
    checkpoints = opened(tmp_path, processes)
    checkpoints.save(5, *trained(processes, seed=0), STATE)
    (checkpoints.folder / "step-00000005" / "optimizer.pt").unlink()
    checkpoints.save(5, *trained(processes, seed=0), STATE)
    assert verify(checkpoints.folder / "step-00000005").step == 5


def test_an_owner_that_finds_a_higher_attempt_stops_without_renaming(tmp_path, processes):
    checkpoints = opened(tmp_path, processes)
    checkpoints.save(5, *trained(processes, seed=0), STATE)
    lock = tmp_path / "run.lock"
    taken = json.loads(lock.read_text()) | {"attempt": 2, "host": "elsewhere"}
    lock.write_text(json.dumps(taken))
    with pytest.raises(StoppedByRule, match=r"run\.lock: another job has taken over this run"):
        checkpoints.save(10, *trained(processes, seed=0), STATE)
    assert [folder.name for folder in checkpoints.folder.iterdir()] == ["step-00000005"]
    assert json.loads(lock.read_text()) == taken


def test_a_save_that_fails_leaves_nothing_behind_and_may_be_repeated(tmp_path, processes):
    checkpoints = opened(tmp_path, processes)
    model, optimizer = trained(processes, seed=0)
    with pytest.raises(TubeletError, match="cannot be written"):
        checkpoints.save(5, model, object(), STATE)
    assert list(checkpoints.folder.iterdir()) == []
    checkpoints.save(5, model, optimizer, STATE)
    assert verify(checkpoints.folder / "step-00000005").step == 5


def test_leftovers_of_an_interrupted_save_are_removed_at_the_start_and_never_resumed(tmp_path, processes):
    leftover = tmp_path / "checkpoints" / "step-00000020.tmp-1"
    leftover.mkdir(parents=True)
    assert find_checkpoint(tmp_path / "checkpoints", "auto") is None
    opened(tmp_path, processes)
    assert not leftover.exists()


def test_another_model_or_another_format_is_refused(tmp_path, processes):
    checkpoints = opened(tmp_path, processes)
    checkpoints.save(5, *trained(processes, seed=0), STATE)
    saved = find_checkpoint(checkpoints.folder, "auto")
    with pytest.raises(Refused, match="holds another model than the configuration describes"):
        checkpoints.load(saved, *trained(processes, seed=0, width=4))
    manifest = saved.folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(Refused, match="has format 99, this Tubelet reads 1"):
        verify(saved.folder)


@pytest.mark.parametrize("changes", [{"every": 0}, {"keep_last": 0}])
def test_intervals_below_one_are_refused(changes):
    with pytest.raises(Refused, match=f"checkpoint.{next(iter(changes))}: 0 must be at least 1"):
        CheckpointConfig(**changes).validate()
