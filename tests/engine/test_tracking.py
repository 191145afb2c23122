"""The run's record: metrics.jsonl line by line, and a real W&B run, offline, in processes of its own."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.engine.mirror import missing_lines, note_mirrored
from pretrain.engine.tracking import Tracker, choose_connection, cut_back, read_metrics, settle_run_id
from pretrain.errors import DiskFull
from tests.runs import run_python
from tests.wandb_server import wandb_history


def quiet_tracker(out: Path, **options) -> Tracker:
    return Tracker(out, "none", {}, "pretrain", **options)


def steps(path: Path) -> list[int]:
    return [entry["step"] for entry in read_metrics(path)]


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


def test_the_mirror_lacks_the_lines_after_the_noted_step_and_forgets_steps_that_the_record_lost(tmp_path):
    record = [{"step": step} for step in (10, 20, 30)]
    assert missing_lines(tmp_path, record) == record
    (tmp_path / "wandb").mkdir()
    note_mirrored(tmp_path, 20)
    assert missing_lines(tmp_path, record) == record[2:]
    assert missing_lines(tmp_path, record[:1]) == []
    assert missing_lines(tmp_path, record) == record[1:], "the steps 20 and 30 were made anew"
    (tmp_path / "wandb" / "mirrored_step").write_text("")
    assert missing_lines(tmp_path, record) == record


def test_a_folder_in_which_wandb_cannot_write_costs_a_warning_and_the_record_goes_on(tmp_path, caplog):
    (tmp_path / "wandb").write_text("a file")
    tracker = Tracker(tmp_path, "wandb", {}, "pretrain")
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    assert f"{tmp_path}/wandb: W&B is not used, since this cannot be written (File exists)" in caplog.text
    assert steps(tracker.path) == [1]


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
