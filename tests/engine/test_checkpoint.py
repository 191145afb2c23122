"""Saving and loading checkpoints: committed by a rename, pruned afterwards, and only by the run's owner."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.commandline import find_recipe
from pretrain.engine import manifest as manifests
from pretrain.engine.checkpoint import CheckpointConfig, Checkpoints, engine_kind
from pretrain.engine.checkpoint_search import beginning, find_checkpoint, step_folders
from pretrain.engine.distributed import Processes
from pretrain.engine.manifest import verify
from pretrain.engine.ownership import RunLock
from pretrain.errors import Refused, StoppedByRule, TubeletError

STATE = {"engine": {"name": "plain data parallelism", "world": "any number of"}, "identity": {"seed": 0}}


@pytest.fixture
def processes():
    with Processes() as opened:
        yield opened


def trained(
    processes: Processes, seed: int, width: int = 3, **options: object
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 0.1} | options)
    model, optimizer = processes.prepare(model, optimizer)
    processes.accelerator.backward(model(torch.ones(1, width)).sum())
    optimizer.step()
    return model, optimizer


def opened(out: Path, processes: Processes, **stays: int) -> Checkpoints:
    return Checkpoints(out / "checkpoints", processes, RunLock(out), CheckpointConfig(**stays))


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


def test_a_leftover_that_cannot_be_removed_does_not_end_the_run(tmp_path, processes, caplog):
    leftover = tmp_path / "checkpoints" / "step-00000020.tmp-1"
    leftover.parent.mkdir()
    leftover.write_text("no folder, which is what removing it expects")
    opened(tmp_path, processes)
    assert f"{leftover} cannot be removed now" in caplog.text


def test_another_model_or_another_format_is_refused(tmp_path, processes):
    checkpoints = opened(tmp_path, processes)
    checkpoints.save(5, *trained(processes, seed=0), STATE)
    saved = find_checkpoint(checkpoints.folder, "auto")
    with pytest.raises(Refused, match="holds another model than the configuration describes"):
        checkpoints.load(saved, *trained(processes, seed=0, width=4))
    path = saved.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(Refused, match="has format 99, this Tubelet reads 1"):
        verify(saved.folder)


def test_a_checkpoint_of_a_newer_tubelet_is_not_passed_over_for_an_older_one(tmp_path, processes, monkeypatch):
    checkpoints = opened(tmp_path, processes)
    for step in (5, 10):
        checkpoints.save(step, *trained(processes, seed=0), STATE)
    newest = step_folders(checkpoints.folder)[-1]
    files = json.loads((newest / "manifest.json").read_text())["files"]
    with monkeypatch.context() as newer:
        newer.setattr(manifests, "FORMAT_VERSION", 2)
        manifests.write_manifest(newest, 10, STATE, files)
    with pytest.raises(Refused, match=r"step-00000010/manifest\.json: has format 2, this Tubelet reads 1; use the Tub"):
        find_checkpoint(checkpoints.folder, "auto")


def names(checkpoints: Checkpoints) -> list[str]:
    return [folder.name for folder in step_folders(checkpoints.folder)]


def test_a_damaged_older_checkpoint_does_not_count_among_those_that_stay(tmp_path, processes):
    written = opened(tmp_path, processes, keep_last=3)
    for step in (5, 10, 15):
        written.save(step, *trained(processes, seed=step), STATE)
    (written.folder / "step-00000010" / "optimizer.pt").write_bytes(b"torn")
    later = Checkpoints(written.folder, processes, written.lock, CheckpointConfig(keep_last=3))
    later.save(20, *trained(processes, seed=20), STATE)
    assert names(later) == ["step-00000005", "step-00000010", "step-00000015", "step-00000020"]
    later.save(25, *trained(processes, seed=25), STATE)
    assert names(later) == ["step-00000015", "step-00000020", "step-00000025"]


def test_what_stays_for_good_stays_beside_the_newest_and_counts_among_them(tmp_path, processes):
    checkpoints = opened(tmp_path, processes, every=5, keep_last=2, keep_every=15)
    for step in range(5, 50, 5):
        checkpoints.save(step, *trained(processes, seed=step), STATE)
    assert [int(name[-8:]) for name in names(checkpoints)] == [15, 30, 40, 45]


def test_an_old_checkpoint_that_cannot_be_removed_costs_one_warning(tmp_path, processes, caplog):
    checkpoints = opened(tmp_path, processes, keep_last=1)
    (tmp_path / "elsewhere").mkdir()
    checkpoints.folder.joinpath("step-00000001").symlink_to(tmp_path / "elsewhere")  # which rmtree does not touch
    with caplog.at_level(logging.WARNING, "pretrain"):
        checkpoints.save(5, *trained(processes, seed=0), STATE)
    assert "step-00000001 cannot be removed now" in caplog.text
    assert find_checkpoint(checkpoints.folder, "auto").step == 5


def test_a_device_without_memory_is_not_taken_for_another_model(tmp_path, processes):
    class Full(nn.Linear):
        def load_state_dict(self, *arguments, **options):
            raise torch.OutOfMemoryError("CUDA out of memory")

    checkpoints = opened(tmp_path, processes)
    checkpoints.save(5, *trained(processes, seed=0), STATE)
    model = Full(3, 2)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoints.load(find_checkpoint(checkpoints.folder, "auto"), model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
def test_what_the_configuration_says_of_the_optimiser_holds_after_loading(tmp_path, deepspeed):
    for number, decay in enumerate((0.1, 0.3)):
        file = find_recipe(deepspeed, "deepspeed", ".json") if deepspeed else None
        with Processes(deepspeed=file) as processes:
            state = STATE | {"engine": engine_kind(processes)}
            options = {"weight_decay": decay, "betas": (0.5 + decay, 0.9), "eps": decay}
            model, optimizer = trained(processes, seed=number, **options)
            checkpoints = opened(tmp_path, processes)
            if number == 0:
                checkpoints.save(5, model, optimizer, state)
                checkpoints.lock.release()
                continue
            checkpoints.load(find_checkpoint(checkpoints.folder, "auto"), model, optimizer)
            assert {name: optimizer.param_groups[0][name] for name in options} == options


@pytest.mark.parametrize("resume", ["never", "/elsewhere/step-00000003"])
def test_a_run_goes_on_when_it_is_started_again_by_the_command_that_began_it(tmp_path, processes, resume):
    checkpoints = opened(tmp_path, processes)
    checkpoints.save(5, *trained(processes, seed=0), STATE | {"begun": beginning(resume)})
    assert find_checkpoint(checkpoints.folder, resume).step == 5
    assert find_checkpoint(checkpoints.folder, "auto").step == 5
    checkpoints.save(10, *trained(processes, seed=0), STATE | {"begun": "auto"})
    with pytest.raises(Refused):
        find_checkpoint(checkpoints.folder, resume)


def test_checkpoints_that_would_never_come_to_stay_for_good_are_refused():
    CheckpointConfig(every=5, keep_every=15).validate()
    with pytest.raises(Refused, match=r"keep_every: 12 is no multiple of checkpoint.every 5; use 15"):
        CheckpointConfig(every=5, keep_every=12).validate()


@pytest.mark.parametrize("changes", [{"every": 0}, {"keep_last": 0}, {"keep_every": 0}])
def test_intervals_below_one_are_refused(changes):
    with pytest.raises(Refused, match=f"checkpoint.{next(iter(changes))}: 0 must be at least 1"):
        CheckpointConfig(**changes).validate()
