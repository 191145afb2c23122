"""Weights & Biases under fire: real runs, real W&B processes, servers on loopback that fail in every way."""

import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pretrain.engine.mirror import CORE, END_WITHIN_S
from pretrain.engine.tracking import read_metrics
from tests.runs import Started, own_environment, run, run_python, start, tiny_pretraining
from tests.wandb_server import WandbServer, wandb_history

STEPS = 40
KEY = "0f1e2d3c4b" * 4
WAIT_S = 5.0
"""A step that took so long has waited for W&B, whose timeouts are longer; a busy machine alone takes less."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, packed_shards) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)


def arguments(recipe: Path, out: Path, *more: object) -> list[object]:
    return ["--config", recipe, "--out", out, "--steps", STEPS, "--checkpoint.every", 10, "--tracking", "auto", *more]


def online(url: str, folder: Path) -> dict[str, str]:
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online", "NETRC": str(folder / "none")}


def offline(folder: Path) -> dict[str, str]:
    """No key, and a server that would refuse connections if it were asked."""
    return {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": "offline", "NETRC": str(folder / "none")}


def record(out: Path) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in read_metrics(out / "metrics.jsonl")]


def sent(rows: list[dict]) -> set[tuple[int, float]]:
    return {(row["step"], row["loss"]) for row in rows if "loss" in row}


def run_id(out: Path) -> str:
    return (out / "wandb" / "run_id").read_text().strip()


def step_seconds(out: Path) -> list[float]:
    return [4 / entry["clips_per_second"] for entry in read_metrics(out / "metrics.jsonl")]


def assert_whole_record(out: Path) -> None:
    assert [step for step, _ in record(out)] == list(range(1, STEPS + 1))


def assert_training_did_not_wait(out: Path, plain: Path) -> None:
    with_wandb, without = step_seconds(out), step_seconds(plain)
    assert max(with_wandb) < WAIT_S
    assert statistics.median(with_wandb) < 3 * statistics.median(without) + 0.05


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory) -> Path:
    """The run without W&B."""
    out = tmp_path_factory.mktemp("plain") / "run"
    done = run("pretrain", arguments(recipe, out, "--tracking", "none"), out.parent)
    assert done.code == 0, done.text
    return out


def end_in_time(going: Started, code: int = 0) -> None:
    """Waits for the end of a run; W&B may hold it up, but not for long."""
    last = time.monotonic()
    going.wait()
    assert time.monotonic() - last < END_WITHIN_S + 20, "the steps, the end of W&B, and the end of the process"
    assert going.code == code, going.text
    assert "Traceback" not in going.text


def warnings(going: Started) -> list[str]:
    return re.findall(r"WARNING: (W&B .*)", going.text)


def test_a_server_that_accepts_and_never_answers_costs_training_nothing_and_the_run_is_kept_offline(
    recipe, plain, tmp_path
):
    out = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        going = start("pretrain", arguments(recipe, out), tmp_path, environment=online(url, tmp_path))
        assert going.wait_for(lambda: len(record(out)) == 1)
        assert not warnings(going), "training began before W&B had given up"
        end_in_time(going)
    (warning,) = warnings(going) or [going.text]
    assert re.match(rf"W&B cannot be reached .* kept offline, `wandb sync .*offline-run-\*-{run_id(out)}`", warning)
    assert_training_did_not_wait(out, plain)
    assert_whole_record(out)
    assert sent(wandb_history(out)) == set(record(out)) == set(record(plain))


@pytest.mark.parametrize("failure", ["falls silent", "goes away"])
def test_what_a_server_that_fails_in_the_middle_of_a_run_did_not_take_is_kept_and_sent_later(
    recipe, plain, tmp_path, failure
):
    out = tmp_path / "run"
    command = arguments(recipe, out, "--steps", 100_000, "--checkpoint.every", 1000)
    with WandbServer() as server:
        going = start("pretrain", command, tmp_path, environment=online(server.url, tmp_path))
        assert going.wait_for(lambda: (out / "wandb" / "run_id").exists() and server.rows(run_id(out)))
        failed_at = len(record(out))
        server.silent.set()
        if failure == "goes away":
            server.go_away()
        assert going.wait_for(lambda: len(record(out)) >= failed_at + 20), going.text
        going.kill(signal.SIGTERM)
        end_in_time(going, code=75)
    lines = record(out)
    assert_training_did_not_wait(out, plain)
    (warning,) = warnings(going)
    folder = re.search(r"`wandb sync --include-online (\S+)` uploads what it kept", warning)[1]
    assert sent(wandb_history(out, "run-*")) == set(lines)
    with WandbServer() as healthy:
        sync(folder, online(healthy.url, tmp_path), tmp_path)
        assert sent(healthy.rows(run_id(out))) == set(lines)
    with WandbServer() as healthy:
        again = run(
            "pretrain",
            [*command, "--steps", lines[-1][0] + 3],
            tmp_path,
            environment=online(healthy.url, tmp_path),
        )
        assert again.code == 0, again.text
        assert not warnings(again)
        assert list(healthy.histories) == [run_id(out)]
        assert sent(healthy.rows(run_id(out))) == set(record(out))


def sync(folder: str | Path, environment: dict[str, str], place: Path) -> None:
    """Uploads W&B folders as a user does, from a folder in which W&B may leave its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "wandb",
            "sync",
            "--include-online",
            *sorted(map(str, Path(folder).parent.glob(Path(folder).name))),
        ],
        cwd=place,
        env=own_environment() | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ERROR" not in done.stderr, "it may fail with exit code 0"


def test_offline_through_restarts_each_folder_has_the_run_id_and_together_they_hold_every_step(recipe, plain, tmp_path):
    out = tmp_path / "run"
    for after, number in ((5, signal.SIGKILL), (15, signal.SIGTERM), (25, signal.SIGKILL)):
        going = start("pretrain", arguments(recipe, out), tmp_path, environment=offline(tmp_path))
        assert going.wait_for(lambda: len(record(out)) >= after and list((out / "wandb").glob("offline-*"))), going.text  # noqa: B023
        going.kill(number)
        going.wait()
    last = run("pretrain", arguments(recipe, out), tmp_path, environment=offline(tmp_path))
    assert last.code == 0, last.text
    assert not warnings(last)
    assert_whole_record(out)
    assert record(out) == record(plain)
    folders = list((out / "wandb").glob("offline-run-*"))
    assert {folder.name.rpartition("-")[2] for folder in folders} == {run_id(out)}
    assert sent(wandb_history(out)) >= set(record(out))
    attempts = read_metrics(out / "environment.jsonl")
    assert [entry["attempt"] for entry in attempts] == [1, 2, 3, 4]
    with WandbServer() as server:
        sync(out / "wandb" / f"offline-run-*-{run_id(out)}", online(server.url, tmp_path), tmp_path)
        assert list(server.histories) == [run_id(out)]
        assert sent(server.rows(run_id(out))) >= set(record(out))


def core_of(going: Started) -> psutil.Process | None:
    children = psutil.Process(going.pids[0]).children()
    return next((child for child in children if child.name() == CORE), None)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_training_goes_on_when_wandbs_own_process_hangs_or_dies(recipe, plain, tmp_path, number):
    out = tmp_path / "run"
    with WandbServer() as server:
        command = arguments(recipe, out, "--steps", 2000, "--checkpoint.every", 1000)
        going = start("pretrain", command, tmp_path, environment=online(server.url, tmp_path))
        assert going.wait_for(lambda: (out / "wandb" / "run_id").exists() and server.rows(run_id(out)))
        core = core_of(going)
        signalled_at = len(record(out))
        core.send_signal(number)
        assert going.wait_for(lambda: len(record(out)) >= signalled_at + 20), going.text
        going.kill(signal.SIGTERM)
        end_in_time(going, code=75)
        assert len(warnings(going)) == 1
        assert_training_did_not_wait(out, plain)
        assert not core.is_running() or core.status() == psutil.STATUS_ZOMBIE


def test_an_unreachable_server_means_an_offline_run_with_one_warning_in_bounded_time(tmp_path):
    started = time.monotonic()
    unreachable = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
    done = run_python(
        """
        import logging
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
        from pathlib import Path
        from pretrain.engine.tracking import Tracker
        tracker = Tracker(Path("run"), "auto", {}, "finetune")
        tracker.log(1, {"loss": 0.5})
        tracker.finish()
        """,
        tmp_path,
        **unreachable,
    )
    assert time.monotonic() - started < END_WITHIN_S + 15
    assert (done.returncode, done.stdout) == (0, "")
    waiting, warning = done.stderr.splitlines()
    assert waiting.startswith("INFO waiting for W&B")
    assert warning.startswith("WARNING W&B cannot be reached")
    assert "wandb sync run/wandb/offline-run-*-" in warning
    assert [(row["step"], row["loss"]) for row in wandb_history(tmp_path / "run")] == [(1, 0.5)]


def test_what_a_signal_to_wandbs_process_kept_from_it_is_sent_by_the_next_attempt(tmp_path):
    done = run_python(
        """
        import logging, signal, time
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
        from pathlib import Path
        import psutil
        from pretrain.engine.tracking import Tracker
        def wait_for_core():
            while not any(Path("run/wandb").glob("offline-run-*/*.wandb")) or not psutil.Process().children():
                time.sleep(0.05)
            return psutil.Process().children(recursive=True)
        first = Tracker(Path("run"), "wandb", {}, "pretrain")
        first.log(1, {"loss": 1.0})
        children = wait_for_core()
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            for child in children:
                child.send_signal(number)
        first.log(2, {"loss": 2.0})
        first.finish()
        second = Tracker(Path("run"), "wandb", {}, "pretrain")
        children = wait_for_core()
        for child in children:
            child.terminate()
        psutil.wait_procs(children, timeout=20)
        time.sleep(0.5)
        for step in (3, 4):
            second.log(step, {"loss": float(step), "rate": float("nan")})
        second.finish()
        third = Tracker(Path("run"), "wandb", {}, "pretrain")
        third.log(5, {"loss": 5.0})
        third.finish()
        """,
        tmp_path,
    )
    assert done.returncode == 0
    assert done.stderr.count("WARNING") == 1, "USR1 and USR2 do nothing to it"
    sent = [(row["step"], row["loss"]) for row in wandb_history(tmp_path / "run") if "loss" in row]
    assert sorted(set(sent)) == [(step, float(step)) for step in range(1, 6)]


def test_what_a_kill_after_finish_kept_from_the_file_is_sent_by_the_next_attempt(tmp_path):
    """W&B's process is killed between its answer to `finish` and its last writing, which leaves the file's header."""
    done = run_python(
        """
        import contextlib, os
        from pathlib import Path
        import psutil, wandb
        from pretrain.engine.mirror import CORE
        from pretrain.engine.tracking import Tracker
        from pretrain.engine.wandb_files import HEADER_BYTES
        tear_down = wandb.teardown
        def tear_down_after_a_kill():
            wandb.teardown = tear_down
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if child.name() == CORE:
                        child.kill()
            with contextlib.suppress(Exception, SystemExit):
                tear_down()
            (path,) = Path("run/wandb").glob("offline-run-*/*.wandb")
            os.truncate(path, HEADER_BYTES)
        for step, ends in ((1, tear_down_after_a_kill), (2, tear_down)):
            tracker = Tracker(Path("run"), "wandb", {}, "pretrain")
            tracker.log(step, {"loss": float(step)})
            wandb.teardown = ends
            tracker.finish()
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B ended before it had written everything") == 1
    assert [(row["step"], row["loss"]) for row in wandb_history(tmp_path / "run")] == [(1, 1.0), (2, 2.0)]
    assert (tmp_path / "run" / "wandb" / "mirrored_step").read_text() == "2\n"


def test_a_wandb_setting_that_is_wrong_costs_one_warning(tmp_path):
    done = run_python(
        """
        from pathlib import Path
        from pretrain.engine.tracking import Tracker
        tracker = Tracker(Path("run"), "wandb", {}, "pretrain")
        tracker.log(1, {"loss": 1.0})
        tracker.finish()
        """,
        tmp_path,
        WANDB_INIT_TIMEOUT="soon",
    )
    assert done.returncode == 0
    assert done.stderr.startswith("W&B could not start")
    assert len(done.stderr.splitlines()) == 1
    assert record(tmp_path / "run") == [(1, 1.0)]
