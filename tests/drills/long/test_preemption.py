"""Runs that are told to stop, by real signals to real processes: all ranks save and end together, and go on exactly."""

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from launch.cli import main
from pretrain.engine.checkpoint_search import step_folders
from pretrain.engine.manifest import verify
from pretrain.engine.signals import STOP_SIGNALS
from pretrain.engine.tracking import read_metrics
from tests.runs import TINY, TINY_ENCODER, Started, run, start, tiny_pretraining

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


def stopped(started: Started, out: Path, after: int, number: signal.Signals, rank: int) -> None:
    """Sends a signal to one rank once so many steps are done, and waits for the end of all."""
    assert started.wait_for(lambda: len(record(out)) >= after and not (out / "outcome.json").exists()), started.text
    os.kill(started.pids[rank], number)
    started.wait()


def assert_the_same(out: Path, undisturbed: Path) -> None:
    assert record(out) == record(undisturbed)
    weights = [(folder / "encoder" / "model.safetensors").read_bytes() for folder in (out, undisturbed)]
    assert weights[0] == weights[1]


def test_signals_to_one_rank_stop_all_ranks_together_and_the_run_goes_on_as_one(
    recipe, packed_shards, undisturbed, tmp_path
):
    out = tmp_path / "run"
    command = arguments(recipe, out, *validated(packed_shards), "--tracking", "wandb")
    done = 0
    for number, rank in ((signal.SIGUSR2, 1), (signal.SIGTERM, 0), (signal.SIGUSR1, 1)):
        going = start("pretrain", command, tmp_path, world=2, environment=OFFLINE)
        stopped(going, out, done + 3, number, rank)
        assert going.codes == [75, 75], going.text
        assert "Traceback" not in going.text
        assert newest(out) > done
        done = newest(out)
        said = f"{number.name} (rank {rank}): ended after step {done}, which is saved; start the same command again"
        assert f"tubelet: {said} to go on\n" in going.text
        assert going.text.count("tubelet: ") == 1
        assert outcome(out)["exit_code"] == 75
        assert outcome(out)["reason"].startswith(f"Preempted: {said}")
    last = run("pretrain", command, tmp_path, world=2, environment=OFFLINE)
    assert last.codes == [0, 0], last.text
    assert (outcome(out)["exit_code"], outcome(out)["attempt"]) == (0, 4)
    assert_the_same(out, undisturbed)
    identities = [folder.name.rpartition("-")[2] for folder in (out / "wandb").glob("offline-run-*")]
    assert identities == [verify(step_folders(out / "checkpoints")[-1]).state["run_id"]] * 4


def test_a_signal_to_every_process_of_a_run_spares_its_workers_until_it_is_saved(
    recipe, packed_shards, undisturbed, tmp_path
):
    out = tmp_path / "run"
    going = start("pretrain", arguments(recipe, out, "--data.workers", 2), tmp_path, world=2)
    assert going.wait_for(lambda: len(record(out)) >= 3)
    family = [child for pid in going.pids for child in psutil.Process(pid).children(recursive=True)]
    assert len(family) >= 2 * 6, "a resource tracker, a fork server, two workers, and a decode child of each"
    going.kill(signal.SIGTERM)
    assert going.wait().codes == [75, 75], going.text
    assert "Traceback" not in going.text
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert newest(out) == len(record(out)) < STEPS
    last = run("pretrain", arguments(recipe, out), tmp_path, world=2)
    assert last.codes == [0, 0], last.text
    weights = [(folder / "encoder" / "model.safetensors").read_bytes() for folder in (out, undisturbed)]
    assert weights[0] == weights[1]


def test_ctrl_c_saves_and_a_second_signal_in_the_middle_of_that_ends_the_run_at_once(recipe, tmp_path):
    out = tmp_path / "run"
    command = arguments(recipe, out, "--checkpoint.every", 2)
    going = start("pretrain", command, tmp_path, sync_s=0.6)
    assert going.wait_for(lambda: step_folders(out / "checkpoints"))
    before = newest(out)
    os.kill(going.pids[0], signal.SIGINT)
    asked_s = time.monotonic()
    assert going.wait_for(lambda: time.monotonic() > asked_s + 1.2 and list((out / "checkpoints").glob("*.tmp-*")))
    os.kill(going.pids[0], signal.SIGTERM)
    assert going.wait().code == 128 + signal.SIGTERM
    assert not (out / "outcome.json").exists()
    assert newest(out) in (before, before + 2)
    again = start("pretrain", command, tmp_path)
    assert again.wait_for(lambda: "going on from step " in again.text)
    os.kill(again.pids[0], signal.SIGINT)
    assert again.wait().code == 130
    done = newest(out)
    assert (
        f"tubelet: interrupted after step {done}, which is saved; start the same command again to go on" in again.text
    )
    assert outcome(out)["exit_code"] == 130
    assert not list((out / "checkpoints").glob("*.tmp-*"))


def test_a_run_that_is_out_of_time_before_its_first_step_ends_without_a_checkpoint(recipe, tmp_path, capsys):
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    out = tmp_path / "run"
    command = ["pretrain", *map(str, arguments(recipe, out, "--stopping.time_limit_s", 1e-9))]
    assert main(command) == 75
    said = "stopping.time_limit_s is over: ended before its first step; start the same command again to go on"
    assert f"tubelet: {said}\n" in capsys.readouterr().err
    assert outcome(out)["reason"] == f"Preempted: {said}"
    assert not step_folders(out / "checkpoints")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_a_limit_of_time_saves_and_the_run_goes_on_after_it(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["pretrain", *map(str, arguments(recipe, out, "--steps", 100_000))]
    assert main([*command, "--stopping.time_limit_s", "2"]) == 75
    done = newest(out)
    assert f"stopping.time_limit_s is over: ended after step {done}, which is saved" in capsys.readouterr().err
    assert main([*command, "--steps", str(done + 3)]) == 0  # longer than the warm-up
    assert [entry[0] for entry in record(out)] == list(range(1, done + 4))


def test_a_signal_in_the_final_evaluation_abandons_it_and_the_next_attempt_makes_it(recipe, packed_shards, tmp_path):
    finetuning = tmp_path / "finetune.yaml"
    architecture = "architecture: " + TINY_ENCODER.replace(", drop_path: 0.2", "")
    finetuning.write_text(TINY.replace("data:", f"data:\n  shards: {packed_shards}") + architecture)
    out = tmp_path / "run"
    views = ["--validation.shards", packed_shards, "--validation.every", 1000, "--views.temporal", 8]
    command = ["--config", finetuning, "--out", out, "--steps", 4, *views, "--views.spatial", 3, "--mixing.mixup", 0]
    going = start("finetune", command, tmp_path)
    stopped(going, out, 4, signal.SIGTERM, 0)
    assert going.code == 75, going.text
    assert "ended after its last step, which is saved; start the same command again to go on" in going.text
    assert newest(out) == 4
    assert not (out / "summary.json").exists()
    again = run("finetune", command, tmp_path)
    assert again.code == 0, again.text
    assert json.loads((out / "summary.json").read_text())["steps"] == 4
    assert (out / "evaluation.json").exists()


def test_a_rank_that_is_stopped_is_missed_and_the_others_tell_where_they_wait_and_end(recipe, tmp_path):
    out = tmp_path / "run"
    going = start("pretrain", arguments(recipe, out, "--stopping.hang_limit_s", 2), tmp_path, world=2)
    assert going.wait_for(lambda: len(record(out)) >= 3)
    os.kill(going.pids[1], signal.SIGSTOP)
    started_s = time.monotonic()
    going.wait_for(lambda: going.is_over() or going.codes[0] is not None)
    os.kill(going.pids[1], signal.SIGKILL)  # as srun does with --kill-on-bad-exit
    assert going.wait().codes == [1, -signal.SIGKILL], going.text
    assert 2 <= time.monotonic() - started_s < 60
    stacks = (out / "stacks" / "rank-0.txt").read_text()
    assert re.search(r"step \d+ took longer than 2 s", stacks)
    assert "trainer.py" in stacks, "it waited for the other in a collective, which is C code"
    assert outcome(out)["exit_code"] == 1
    assert re.search(r"Hang: step \d+ took longer than 2 s \(stopping.hang_limit_s\)", outcome(out)["reason"])
