"""Saving beside training: what is written later is what it was in the step that saved, and commits as ever."""

import json
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pretrain.commandline import find_recipe
from pretrain.data.loader import NoSubstitute
from pretrain.engine.checkpoint import CheckpointConfig, Checkpoints, engine_kind
from pretrain.engine.checkpoint_search import find_checkpoint, step_folders
from pretrain.engine.distributed import Processes
from pretrain.engine.ownership import RunLock
from pretrain.engine.saving import Exported, Saving, whole_weights
from pretrain.errors import StoppedByRule, TubeletError


def prepared(processes: Processes) -> tuple[Any, Any]:
    """A model with two groups of parameters, and its optimiser."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias, *model[1].parameters()]}]
    return processes.prepare(model, torch.optim.AdamW(groups, lr=0.1, fused=True))


def train(processes: Processes, model: Any, optimizer: Any) -> None:
    processes.accelerator.backward(model(torch.ones(2, 5))[:, :2].square().sum())
    optimizer.step()
    optimizer.zero_grad()


class Held:
    """A run of one process that saves beside training, and whose writer waits until it is let go."""

    def __init__(self, out: Path, processes: Processes) -> None:
        self.out, self.processes = out, processes
        self.model, self.optimizer = prepared(processes)
        self.checkpoints = Checkpoints(out / "checkpoints", processes, RunLock(out), CheckpointConfig(background=True))
        self.saving = Saving(self.checkpoints, processes, self.export)
        self.go_on = threading.Event()
        self.train()

    def train(self) -> None:
        train(self.processes, self.model, self.optimizer)

    def export(self, model: nn.Module) -> Exported:
        return Exported(whole_weights(self.processes, model), lambda weights: save_file(weights, self.out / "exported"))

    def begin(self, step: int) -> None:
        self.checkpoints._writer.submit(self.go_on.wait)
        self.saving.save(step, self.model, self.optimizer, {"engine": engine_kind(self.processes)})

    @property
    def committed(self) -> list[int]:
        return [int(folder.name.removeprefix("step-")) for folder in step_folders(self.checkpoints.folder)]


def content_of(folder: Path) -> dict[str, list[Any]]:
    """Returns checksums of all tensors in a checkpoint's files, and what files without any hold."""
    contents: dict[str, list[Any]] = {}
    for path in folder.rglob("*"):
        if path.suffix == ".pt":
            members = zipfile.ZipFile(path).infolist()
            contents[path.name] = [(one.filename, one.CRC) for one in members if "/data/" in one.filename]
        elif path.name != "manifest.json" and path.is_file():
            contents[path.name] = [path.read_bytes()]
    return contents


@pytest.fixture
def held(tmp_path):
    with Processes() as processes:
        run = Held(tmp_path, processes)
        yield run
        run.go_on.set()


@pytest.mark.parametrize("deepspeed", [None, "zero0", "zero1", "zero2", "zero3"])
def test_what_is_written_while_training_goes_on_is_to_the_bit_what_was_written_at_once(tmp_path, deepspeed):
    file = find_recipe(deepspeed, "deepspeed", ".json") if deepspeed else None
    with Processes(deepspeed=file) as processes:
        model, optimizer = prepared(processes)
        checkpoints = Checkpoints(tmp_path, processes, RunLock(tmp_path), CheckpointConfig(keep_last=9))
        for step in (1, 3):  # the second copy goes into the memory of the first
            train(processes, model, optimizer)
            checkpoints.save(step, model, optimizer, {})
            wait = threading.Event()
            checkpoints._writer.submit(wait.wait)
            checkpoints.begin(step + 1, model, optimizer, {})
            train(processes, model, optimizer)
            wait.set()
            checkpoints.finish()
    contents = [content_of(folder) for folder in step_folders(tmp_path)]
    assert contents[0] == contents[1]
    assert contents[2] == contents[3]
    assert contents[0] != contents[2]


def test_a_save_is_committed_once_it_is_written_and_its_export_holds_the_weights_of_that_step(held):
    weights = {name: value.clone() for name, value in held.model.state_dict().items()}
    held.begin(1)
    held.train()
    assert (held.saving.is_written, held.committed) == (False, [])
    assert not (held.out / "exported").exists()
    held.go_on.set()
    held.saving.commit()
    assert (held.saving.is_written, held.committed) == (True, [1])
    held.saving.finish()
    for path in (held.out / "exported", held.checkpoints.folder / "step-00000001" / "model.safetensors"):
        written = load_file(path)
        assert all(torch.equal(written[name], value) for name, value in weights.items())
    assert not torch.equal(weights["0.weight"], held.model.state_dict()["0.weight"])


def test_the_next_save_waits_for_the_one_in_flight_and_commits_it(held):
    held.begin(1)
    threading.Timer(0.2, held.go_on.set).start()
    held.saving.save(2, held.model, held.optimizer, {}, at_once=True)
    assert held.go_on.is_set()
    assert held.committed == [1, 2]


def test_a_writer_that_fails_is_told_and_leaves_the_checkpoint_before_and_its_export_as_they_were(held):
    held.go_on.set()
    held.begin(1)
    held.saving.finish()
    exported = (held.out / "exported").read_bytes()
    held.go_on.clear()
    held.train()
    held.begin(2)
    (held.checkpoints.folder / "step-00000002.tmp-1" / "optimizer.pt").mkdir()
    held.go_on.set()
    with pytest.raises(TubeletError, match=r"step-00000002: cannot be written: .*the checkpoints before it are whole"):
        held.saving.finish()
    assert [folder.name for folder in held.checkpoints.folder.iterdir()] == ["step-00000001"]
    assert (held.out / "exported").read_bytes() == exported
    held.saving.save(3, held.model, held.optimizer, {}, at_once=True)
    assert held.committed == [1, 3]


def test_what_cannot_be_copied_is_told_when_it_would_be_committed(held):
    held.checkpoints.begin(1, held.model, object(), {})
    with pytest.raises(TubeletError, match=r"step-00000001: cannot be written: 'object' object has no attribute"):
        held.checkpoints.finish()
    assert list(held.checkpoints.folder.iterdir()) == []


def test_an_owner_that_lost_the_run_while_it_wrote_neither_commits_nor_exports(held):
    held.begin(1)
    lock = held.out / "run.lock"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"attempt": 2, "host": "elsewhere"}))
    held.go_on.set()
    with pytest.raises(StoppedByRule, match="another job has taken over this run"):
        held.saving.commit()
    held.saving.finish_before_the_end()
    assert held.committed == []
    assert not (held.out / "exported").exists()


def test_an_export_that_fails_is_told_no_later_than_by_the_next_save(held):
    held.saving.export = lambda model: Exported({}, lambda weights: (held.out / "nowhere" / "file").write_bytes(b""))
    held.go_on.set()
    held.begin(1)
    held.saving.commit()
    with pytest.raises(FileNotFoundError):
        held.saving.save(2, held.model, held.optimizer, {})
    assert held.committed == [1]


@pytest.mark.parametrize("error", [StoppedByRule("a loss"), ValueError("a bug")])
def test_an_end_that_all_ranks_meet_commits_what_is_in_flight(held, error):
    held.begin(1)
    held.go_on.set()
    with pytest.raises(type(error)), held.saving.finished_at_the_end():
        raise error
    assert held.committed == [1]


def test_an_end_that_other_ranks_may_not_know_of_waits_for_nobody(held):
    held.begin(1)
    held.saving.processes = type("Two", (), {"world": 2})()
    with pytest.raises(ValueError, match="a bug"), held.saving.finished_at_the_end():
        raise ValueError("a bug")
    assert held.committed == []


def test_a_failed_save_does_not_hide_why_the_run_ends(held, caplog):
    held.begin(1)
    (held.checkpoints.folder / "step-00000001.tmp-1" / "optimizer.pt").mkdir()
    held.go_on.set()
    with pytest.raises(StoppedByRule, match="a loss"), held.saving.finished_at_the_end():
        raise StoppedByRule("a loss")
    assert "the last save, or its export, may be lost: " in caplog.text


def test_a_rank_that_alone_has_to_end_waits_for_no_other(held, monkeypatch):
    held.begin(1)
    held.go_on.set()
    monkeypatch.setattr(held.processes, "world", 2)
    with pytest.raises(NoSubstitute), held.saving.finished_at_the_end():
        raise NoSubstitute("a sample of this rank")
    monkeypatch.undo()
    assert held.saving.awaits_commit


def test_after_a_commit_that_failed_nothing_is_in_flight_to_wait_for(held):
    held.begin(1)
    (held.checkpoints.folder / "step-00000001.tmp-1" / "optimizer.pt").mkdir()
    held.go_on.set()
    with pytest.raises(TubeletError):
        held.saving.commit()
    assert not held.saving.awaits_commit
    held.processes.world, world = 2, held.processes.world  # of two ranks this one would wait alone
    held.saving.finish()
    held.processes.world = world


def test_a_checkpoint_written_beside_training_is_one_to_go_on_from(held):
    held.go_on.set()
    held.begin(1)
    held.train()
    held.saving.finish()
    saved = find_checkpoint(held.checkpoints.folder, "auto")
    held.checkpoints.load(saved, held.model, held.optimizer)
    assert torch.equal(held.model.state_dict()["0.weight"], load_file(held.out / "exported")["0.weight"])
