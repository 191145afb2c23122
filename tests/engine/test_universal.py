"""Checkpoints of ZeRO that other numbers of processes read: converted once, whole or not at all, and pruned."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.commandline import find_recipe
from pretrain.engine.checkpoint import CheckpointConfig, Checkpoints, engine_kind
from pretrain.engine.checkpoint_search import find_checkpoint
from pretrain.engine.distributed import Precision, Processes
from pretrain.engine.manifest import Saved, verify
from pretrain.engine.ownership import RunLock
from pretrain.errors import DiskFull, Refused, StoppedByRule, TubeletError

DECAYS = (0.5, 0.0)


def prepared(processes: Processes, seed: int) -> tuple[Any, Any]:
    """An engine with two groups of parameters after two steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    groups = [
        {"params": [model[0].weight], "weight_decay": DECAYS[0], "lr_scale": 0.5},
        {"params": [model[0].bias, *model[1].parameters()], "weight_decay": DECAYS[1], "lr_scale": 1.0},
    ]
    engine, optimizer = processes.prepare(model, torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9)))
    train(processes, engine, steps=2)
    return engine, optimizer


def train(processes: Processes, engine: Any, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        clips = (torch.arange(20.0).view(4, 5).sin() + step).to(next(engine.parameters()).dtype)
        loss = engine(clips)[:, :2].float().square().sum()
        processes.accelerator.backward(loss)
        losses.append(loss.item())
    return losses


def zero(stage: int, precision: Precision = "fp32") -> Processes:
    return Processes(precision, deepspeed=find_recipe(f"zero{stage}", "deepspeed", ".json"))


def opened(out: Path, processes: Processes, **stays: int) -> Checkpoints:
    return Checkpoints(out / "checkpoints", processes, RunLock(out), CheckpointConfig(**stays))


def of_another_world(checkpoints: Checkpoints) -> Saved:
    """The newest checkpoint, as if two processes had written it."""
    saved = find_checkpoint(checkpoints.folder, "auto")
    engine = saved.state["engine"] | {"world": 2}
    return dataclasses.replace(saved, state=saved.state | {"engine": engine})


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_training_goes_on_from_a_conversion_as_without_it_and_the_groups_stay_as_configured(
    tmp_path, stage, precision, caplog
):
    with zero(stage, precision) as processes:
        engine, optimizer = prepared(processes, seed=0)
        checkpoints = opened(tmp_path, processes)
        checkpoints.save(2, engine, optimizer, {"engine": engine_kind(processes)})
        expected = train(processes, engine, steps=4)
        checkpoints.lock.release()
    with zero(stage, precision) as processes:
        engine, optimizer = prepared(processes, seed=1)
        checkpoints = opened(tmp_path, processes)
        with caplog.at_level(logging.INFO, "pretrain"):
            checkpoints.load(of_another_world(checkpoints), engine, optimizer)
        assert "step-00000002, which 2 processes wrote, for 1" in caplog.text
        assert [(group["weight_decay"], group["lr_scale"]) for group in optimizer.param_groups] == [
            (0.5, 0.5),
            (0.0, 1.0),
        ]
        assert train(processes, engine, steps=4) == pytest.approx(expected, rel=1e-6)
        counters = [state["step"] for state in engine.optimizer.optimizer.state.values()]
        assert [float(counter) for counter in counters] == [6.0, 6.0], "each group counts its own steps"
    assert {path.name for path in checkpoints.folder.iterdir()} == {"step-00000002", "universal-00000002"}


@pytest.fixture
def processes():
    with zero(1) as opened:
        yield opened


@pytest.fixture
def checkpoints(tmp_path, processes) -> Checkpoints:
    """Checkpoints of which one is of another world, and an engine that can load it."""
    written = opened(tmp_path, processes, keep_last=1)
    written.prepared = prepared(processes, seed=0)
    written.save(2, *written.prepared, {"engine": engine_kind(processes)})
    return written


def test_a_conversion_is_made_once_again_when_damaged_and_goes_with_its_checkpoint(checkpoints, caplog):
    saved, folder = of_another_world(checkpoints), checkpoints.folder / "universal-00000002"
    checkpoints.load(saved, *checkpoints.prepared)
    written = (folder / "manifest.json").stat().st_ino
    checkpoints.load(saved, *checkpoints.prepared)
    assert (folder / "manifest.json").stat().st_ino == written
    weights = next(folder.rglob("fp32.pt"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "pretrain"):
        checkpoints.load(saved, *checkpoints.prepared)
    assert f"{weights}: has" in caplog.text
    assert "converting" in caplog.text
    verify(folder)
    checkpoints.save(4, *checkpoints.prepared, saved.state)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000004"]


def test_a_conversion_of_another_checkpoint_of_the_same_step_is_not_taken_for_it(checkpoints):
    folder = checkpoints.folder / "universal-00000002"
    checkpoints.load(of_another_world(checkpoints), *checkpoints.prepared)
    before = verify(folder).state
    checkpoints.save(2, *checkpoints.prepared, {"engine": engine_kind(checkpoints.processes), "other": True})
    checkpoints.load(of_another_world(checkpoints), *checkpoints.prepared)
    assert verify(folder).state != before


def test_what_an_interrupted_conversion_left_is_removed_by_the_next_owner(checkpoints, tmp_path):
    leftover = checkpoints.folder / "universal-00000002.tmp-1"
    (leftover / "deepspeed" / "zero").mkdir(parents=True)
    checkpoints.lock.release()
    opened(tmp_path, checkpoints.processes)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000002"]


def test_a_conversion_that_fails_leaves_nothing_and_names_the_checkpoint(checkpoints):
    saved = of_another_world(checkpoints)
    shutil.copytree(saved.folder, checkpoints.folder.parent / "kept")
    next(saved.folder.rglob("*optim_states.pt")).write_bytes(b"not a checkpoint")
    with pytest.raises(TubeletError, match=r"step-00000002: DeepSpeed cannot convert .*; start with 2 processes"):
        checkpoints.load(saved, *checkpoints.prepared)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000002"]


def test_an_owner_that_lost_the_run_commits_no_conversion(checkpoints, tmp_path):
    (tmp_path / "run.lock").unlink()
    with pytest.raises(StoppedByRule, match="another job has taken over this run"):
        checkpoints.load(of_another_world(checkpoints), *checkpoints.prepared)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000002"]


def test_another_stage_is_refused(checkpoints):
    saved = of_another_world(checkpoints)
    state = saved.state | {"engine": {"name": "DeepSpeed ZeRO 2", "world": 1}}
    with pytest.raises(Refused, match="was written by DeepSpeed ZeRO 2 with 1 processes and cannot be read by"):
        checkpoints.load(dataclasses.replace(saved, state=state), *checkpoints.prepared)


def test_a_checkpoint_that_cannot_fit_is_refused_before_it_begins_and_both_sizes_are_told(checkpoints):
    previous = checkpoints.folder / "step-00000002"
    with open(previous / "sparse", "wb") as file:  # takes no room, but makes the last checkpoint larger than the disk
        file.truncate(shutil.disk_usage(previous).free + (1 << 30))
    with pytest.raises(DiskFull, match=r"step-00000004: takes about .* MiB, as step-00000002 takes, and no more than"):
        checkpoints.save(4, *checkpoints.prepared, {})
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000002"]
