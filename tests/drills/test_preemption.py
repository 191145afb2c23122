"""Runs that are told to stop, by real signals to real processes: all ranks save and end together, and go on exactly."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from pretrain.engine.checkpoint import step_folders, verify
from pretrain.engine.tracking import read_metrics
from tests.runs import Started, run, start, tiny_pretraining

STEPS = 60
SAME = ("step", "loss", "learning_rate", "gradient_norm", "padded", "skipped", "validation_loss")
OFFLINE = {"WANDB_MODE": "offline"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, packed_shards) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)


def arguments(recipe: Path, out: Path, *more: object) -> list[object]:
    return ["--config", recipe, "--out", out, "--steps", STEPS, "--checkpoint.every", 25, *more]


@pytest.fixture(scope="module")
def undisturbed(recipe, packed_shards, tmp_path_factory) -> Path:
    """A run of two processes."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run("pretrain", arguments(recipe, out, *validated(packed_shards)), out.parent, world=2)
    assert done.codes == [0, 0], done.text
    return out


def validated(shards: Path) -> list[object]:
    return ["--validation.shards", shards, "--validation.every", 9]


def record(out: Path) -> list[tuple]:
    return [tuple(entry.get(name) for name in SAME) for entry in read_metrics(out / "metrics.jsonl")]


def outcome(out: Path) -> dict:
    return json.loads((out / "outcome.json").read_text())


def newest(out: Path) -> int:
    """The step of the newest checkpoint, which must be whole."""
    return verify(step_folders(out / "checkpoints")[-1]).step


def stopped(started: Started, out: Path, after: int, number: signal.Signals, rank: int | None) -> None:
    """Sends a signal once a step is done, to one rank alone or to all processes of all ranks, and waits for the end."""
    assert started.wait_for(lambda: len(record(out)) >= after and not (out / "outcome.json").exists()), started.text
    if rank is None:
        started.kill(number)
    else:
        os.kill(started.pids[rank], number)
    started.wait()


def assert_the_same(out: Path, undisturbed: Path) -> None:
    assert record(out) == record(undisturbed)
    weights = [(folder / "encoder" / "model.safetensors").read_bytes() for folder in (out, undisturbed)]
    assert weights[0] == weights[1]


def test_signals_to_one_rank_or_to_all_processes_stop_all_ranks_together_and_the_run_goes_on_as_one(
    recipe, packed_shards, undisturbed, tmp_path
):
    out = tmp_path / "run"
    workers = ["--data.workers", 2, *validated(packed_shards), "--tracking", "wandb"]
    drills = (
        (signal.SIGUSR2, 1, 0),
        (signal.SIGTERM, 0, 0),
        (signal.SIGUSR1, 1, 0),
        (signal.SIGINT, 0, 0),
        (signal.SIGTERM, None, 2),
    )
    done = 0
    for number, rank, workers in drills:
        more = [*validated(packed_shards), "--tracking", "wandb", "--data.workers", workers]
        going = start("pretrain", arguments(recipe, out, *more), tmp_path, world=2, environment=OFFLINE)
        stopped(going, out, done + 3, number, rank)
        code = 130 if number == signal.SIGINT else 75
        assert going.codes == [code, code], going.text
        assert "Traceback" not in going.text
        assert going.text.count("tubelet: ") == 1
        assert newest(out) > done
        done = newest(out)
        assert outcome(out)["exit_code"] == code
        name = "interrupted" if code == 130 else f"{number.name} (rank {rank or 0}): ended"
        assert f"{name} after step {done}, which is saved; start the same command again to go on" in going.text
        assert re.search(r"interrupted" if code == 130 else re.escape(name), outcome(out)["reason"])
    last = run("pretrain", arguments(recipe, out, *validated(packed_shards)), tmp_path, world=2)
    assert last.codes == [0, 0], last.text
    assert outcome(out) | {"exit_code": 0, "reason": "done", "attempt": 6} == outcome(out)
    assert_the_same(out, undisturbed)
    identities = {folder.name.rpartition("-")[2] for folder in (out / "wandb").glob("offline-run-*")}
    assert identities == {verify(step_folders(out / "checkpoints")[-1]).state["run_id"]}
