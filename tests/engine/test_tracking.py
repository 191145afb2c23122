"""The run's record: metrics.jsonl line by line, and real W&B runs, offline, in processes of their own."""

import json
import os
import resource
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.engine.tracking import Tracker, choose_connection, cut_back, read_metrics, settle_run_id
from pretrain.errors import DiskFull

REPOSITORY = Path(__file__).parents[2]
UNREACHABLE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4}


def quiet_tracker(out: Path, **options) -> Tracker:
    return Tracker(out, "none", {}, "pretrain", **options)


def steps(path: Path) -> list[int]:
    return [entry["step"] for entry in read_metrics(path)]


def run_python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a new process that knows of no W&B key but the given one."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(REPOSITORY), "HOME": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yields the records of a .wandb file: seven bytes, then LevelDB's log format in blocks of 32 KiB."""
    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _checksum, size_bytes, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + size_bytes]
        place += 7 + size_bytes
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def wandb_history(out: Path) -> list[dict]:
    """Returns the history rows in all of a run folder's offline .wandb files, oldest file first."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = [
        Record.FromString(content)
        for path in sorted((out / "wandb").glob("offline-run-*/*.wandb"))
        for content in wandb_records(path)
    ]
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def test_each_logged_step_is_one_line_that_is_there_at_once(tmp_path):
    tracker = quiet_tracker(tmp_path / "run")
    tracker.log(10, {"loss": 0.5, "samples": 640, "phase": "warmup"})
    assert tracker.path.read_text() == '{"step": 10, "loss": 0.5, "samples": 640, "phase": "warmup"}\n'
    tracker.log(20, {"loss": 0.25})
    assert steps(tracker.path) == [10, 20]


def test_numbers_that_json_lacks_become_null_and_the_line_stays_valid_json(tmp_path):
    tracker = quiet_tracker(tmp_path)
    tracker.log(1, {"loss": float("nan"), "scale": float("inf"), "rate": 0.1})
    line = json.loads(tracker.path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line == {"step": 1, "loss": None, "scale": None, "rate": 0.1}


def test_scalars_of_array_libraries_are_logged_as_numbers(tmp_path):
    tracker = quiet_tracker(tmp_path)
    tracker.log(1, {"a": np.float32(0.5), "b": np.int64(3), "c": np.array(2.0), "d": np.float32("nan")})
    assert read_metrics(tracker.path) == [{"step": 1, "a": 0.5, "b": 3, "c": 2.0, "d": None}]


@settings(max_examples=30, deadline=None)
@given(logged=st.lists(st.integers(1, 50), unique=True).map(sorted), cut=st.integers(1, 50), torn=st.binary(max_size=9))
def test_after_cutting_back_and_logging_on_no_step_stands_twice(tmp_path_factory, logged, cut, torn):
    tracker = quiet_tracker(tmp_path_factory.mktemp("run"))
    for step in logged:
        tracker.log(step, {"loss": 1.0})
    with open(tracker.path, "ab") as file:
        file.write(b'{"step": 3, "lo' + torn.replace(b"\n", b""))
    cut_back(tracker.path, cut)
    for step in range(cut + 1, 52):
        tracker.log(step, {"loss": 2.0})
    assert steps(tracker.path) == [step for step in logged if step <= cut] + list(range(cut + 1, 52))
    assert all(json.loads(line) for line in tracker.path.read_text().splitlines())


def test_cutting_back_to_the_start_empties_the_record_and_leaves_no_other_file(tmp_path):
    tracker = quiet_tracker(tmp_path)
    cut_back(tracker.path, 0)
    tracker.log(0, {"accuracy": 0.1})
    tracker.log(5, {"loss": 1.0})
    cut_back(tracker.path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert tracker.path.read_bytes() == b""


def test_a_kept_line_is_kept_byte_for_byte(tmp_path):
    tracker = quiet_tracker(tmp_path)
    tracker.log(1, {"loss": 1 / 3, "naïve": "ü"})
    before = tracker.path.read_bytes()
    tracker.log(2, {"loss": 1.0})
    cut_back(tracker.path, 1)
    assert tracker.path.read_bytes() == before


def test_other_ranks_write_nothing(tmp_path):
    tracker = Tracker(tmp_path / "run", "wandb", {}, "pretrain", enabled=False)
    tracker.log(1, {"loss": 1.0})
    tracker.log_picture(1, "strip", tmp_path / "none.png")
    tracker.finish()
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    tracker = quiet_tracker(tmp_path)
    tracker.path.symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=r"metrics\.jsonl: no space left on the disk; free some and start again"):
        tracker.log(1, {"loss": 1.0})


def test_a_disk_that_fills_within_a_line_leaves_no_torn_line(tmp_path):
    tracker = quiet_tracker(tmp_path)
    tracker.log(1, {"loss": 1.0})
    whole = tracker.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, hard))
    try:
        with pytest.raises(DiskFull, match=r"metrics\.jsonl"):
            tracker.log(2, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tracker.path.read_bytes() == whole
    tracker.log(2, {"loss": 1.0})
    assert steps(tracker.path) == [1, 2]


KEY = {"WANDB_API_KEY": "0123456789" * 4, "NETRC": "/nonexistent"}
NO_KEY = {"NETRC": "/nonexistent"}


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", KEY, "online"),
        ("auto", KEY | {"WANDB_MODE": "offline"}, "offline"),
        ("auto", KEY | {"WANDB_MODE": "disabled"}, None),
        ("auto", NO_KEY, None),
        ("auto", NO_KEY | {"WANDB_API_KEY": ""}, None),
        ("auto", NO_KEY | {"WANDB_MODE": "offline"}, "offline"),
        ("wandb", KEY, "online"),
        ("wandb", KEY | {"WANDB_MODE": "offline"}, "offline"),
        ("wandb", NO_KEY, "offline"),
        ("none", KEY, None),
    ],
)
def test_the_mode_and_the_environment_decide_how_wandb_runs(mode, environment, expected):
    assert choose_connection(mode, environment) == expected


def test_a_key_in_netrc_counts_for_its_own_host_only(tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine wandb.example.org\nlogin user\npassword secret\n")
    netrc.chmod(0o600)
    assert choose_connection("auto", {"NETRC": str(netrc)}) is None
    here = {"NETRC": str(netrc), "WANDB_BASE_URL": "https://wandb.example.org"}
    assert choose_connection("auto", here) == "online"


def test_the_run_id_of_a_checkpoint_wins_over_the_folders_which_wins_over_a_new_one(tmp_path):
    path = tmp_path / "wandb" / "run_id"
    new = settle_run_id(path, None)
    assert len(new) == 8
    assert settle_run_id(path, None) == new
    assert settle_run_id(path, "checkpnt") == "checkpnt"
    assert settle_run_id(path, None) == "checkpnt"


def test_importing_the_tracker_and_running_without_a_key_does_not_import_wandb(tmp_path):
    done = run_python(
        """
        import sys
        from pathlib import Path
        from pretrain.engine.tracking import Tracker
        tracker = Tracker(Path("run"), "auto", {}, "pretrain")
        tracker.log(1, {"loss": 1.0})
        tracker.finish()
        assert "wandb" not in sys.modules
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


OFFLINE_RUN = """
    import sys
    from pathlib import Path
    from PIL import Image
    from pretrain.engine.tracking import Tracker, cut_back
    tracker = Tracker(Path("runs/b"), "wandb", {"model": {"width": 64}, "out": Path("runs/b")}, "pretrain")
    cut_back(tracker.path, START)
    for step in range(START + 1, START + 4):
        tracker.log(step, {"loss": 1 / step, "scale": float("nan")})
    Image.new("RGB", (8, 8)).save("strip.png")
    tracker.log_picture(START + 3, "reconstruction", Path("strip.png"))
    print(tracker.run_id)
    tracker.finish()
"""


def test_without_a_key_wandb_runs_offline_silently_and_a_restart_keeps_the_run_id_and_the_steps(tmp_path):
    first = run_python(OFFLINE_RUN.replace("START", "0"), tmp_path)
    second = run_python(OFFLINE_RUN.replace("START", "2"), tmp_path)
    out = tmp_path / "runs" / "b"
    run_id = (out / "wandb" / "run_id").read_text().strip()
    for process in (first, second):
        assert (process.returncode, process.stdout.strip(), process.stderr) == (0, run_id, "")
    assert len(list((out / "wandb").glob(f"offline-run-*-{run_id}"))) == 2
    history = [row for row in wandb_history(out) if "loss" in row]
    assert [(row["step"], row["loss"]) for row in history] == [(step, 1 / step) for step in (1, 2, 3, 3, 4, 5)]
    assert [row["step"] for row in wandb_history(out) if "reconstruction" in str(row)] == [3, 5]
    assert steps(out / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert list((out / "wandb").rglob("media/images/*.png"))


def test_an_unreachable_server_means_an_offline_run_with_one_warning_in_bounded_time(tmp_path):
    started = time.monotonic()
    done = run_python(
        """
        import logging
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
        from pathlib import Path
        from pretrain.engine import tracking
        tracking.INIT_TIMEOUT_S = 3
        tracker = tracking.Tracker(Path("run"), "auto", {}, "finetune")
        tracker.log(1, {"loss": 0.5})
        tracker.finish()
        """,
        tmp_path,
        **UNREACHABLE,
    )
    assert time.monotonic() - started < 20
    assert (done.returncode, done.stdout) == (0, "")
    [warning] = done.stderr.splitlines()
    assert warning.startswith("WARNING W&B cannot be reached")
    assert "wandb sync run/wandb/offline-run-*-" in warning
    assert [(row["step"], row["loss"]) for row in wandb_history(tmp_path / "run")] == [(1, 0.5)]


def test_when_wandbs_process_is_killed_training_goes_on_with_one_warning_and_a_whole_record(tmp_path):
    done = run_python(
        """
        import logging, time
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
        from pathlib import Path
        import psutil
        from pretrain.engine.tracking import Tracker
        tracker = Tracker(Path("run"), "wandb", {}, "pretrain")
        tracker.log(1, {"loss": 1.0})
        for child in psutil.Process().children(recursive=True):
            child.kill()
        for step in range(2, 20):
            time.sleep(0.02)
            tracker.log(step, {"loss": 1.0})
        tracker.finish()
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, "")
    [warning] = done.stderr.splitlines()
    assert warning.startswith("WARNING W&B stopped working")
    assert steps(tmp_path / "run" / "metrics.jsonl") == list(range(1, 20))


def test_what_a_signal_to_wandbs_process_kept_from_it_is_sent_by_the_next_attempt(tmp_path):
    done = run_python(
        """
        import logging, signal, sys
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
        from pathlib import Path
        import psutil
        from pretrain.engine.tracking import Tracker
        first = Tracker(Path("run"), "wandb", {}, "pretrain")
        first.log(1, {"loss": 1.0})
        children = psutil.Process().children(recursive=True)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            for child in children:
                child.send_signal(number)
        first.log(2, {"loss": 2.0})
        first.finish()
        second = Tracker(Path("run"), "wandb", {}, "pretrain")
        children = psutil.Process().children(recursive=True)
        for child in children:
            child.terminate()
        psutil.wait_procs(children, timeout=20)
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
    assert steps(tmp_path / "run" / "metrics.jsonl") == [1]
