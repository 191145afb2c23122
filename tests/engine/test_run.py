"""The life of a run in its folder: claimed, recorded, ended with its outcome, whatever happens in between."""

import errno
import json
import os

import pytest

from pretrain.engine.distributed import Processes
from pretrain.engine.run import open_run
from pretrain.errors import DiskFull, Refused, StoppedByRule
from pretrain.files import append_json_lines


@pytest.fixture
def processes():
    with Processes() as opened:
        yield opened


def opened(out, processes, identity=None, resume="auto"):
    return open_run(str(out), processes, "pretrain", {}, "seed: 0\n", resume, "none", identity or {"seed": 0}, 2)


def outcome(out) -> dict:
    return json.loads((out / "outcome.json").read_text())


def test_an_open_run_is_owned_and_a_closed_one_is_free_and_tells_its_outcome(tmp_path, processes):
    with opened(tmp_path, processes) as run:
        assert not (tmp_path / "outcome.json").exists()
        assert (tmp_path / "config.yaml").read_text() == "seed: 0\n"
        assert run.first_step == 0
        run.finish({"loss": 0.5})
    assert outcome(tmp_path) | {"seconds": 0} == {
        "exit_code": 0,
        "reason": "done",
        "attempt": 1,
        "seconds": 0,
        "pid": os.getpid(),
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": 0.5}
    with opened(tmp_path, processes):
        pass
    assert outcome(tmp_path)["attempt"] == 2


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (StoppedByRule("too bad"), 3, StoppedByRule),
        (Refused("no"), 2, Refused),
        (ValueError("a bug"), 1, ValueError),
        (KeyboardInterrupt(), 130, KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), 2, DiskFull),
        (OSError(errno.EACCES, "Permission denied"), 1, PermissionError),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), 2, DiskFull),
    ],
)
def test_however_a_run_ends_its_outcome_tells_the_exit_code_and_the_reason(tmp_path, processes, error, code, kind):
    with pytest.raises(kind), opened(tmp_path, processes):
        raise error
    assert outcome(tmp_path)["exit_code"] == code
    assert outcome(tmp_path)["reason"].startswith(kind.__name__)
    assert json.loads((tmp_path / "run.lock").read_text())["released"]


def test_an_owner_that_lost_the_run_leaves_the_new_owners_outcome_alone(tmp_path, processes):
    with opened(tmp_path, processes):
        lock = json.loads((tmp_path / "run.lock").read_text())
        (tmp_path / "run.lock").write_text(json.dumps(lock | {"attempt": 2, "host": "elsewhere"}))
        (tmp_path / "outcome.json").write_text("the new owner's")
    assert (tmp_path / "outcome.json").read_text() == "the new owner's"
    assert json.loads((tmp_path / "run.lock").read_text())["host"] == "elsewhere"


def test_a_fresh_start_empties_the_records_of_an_attempt_that_saved_nothing(tmp_path, processes):
    for name in ("metrics.jsonl", "skipped.jsonl"):
        append_json_lines(tmp_path / name, [{"step": 1, "key": "a"}, {"step": 2, "key": "b"}])
    with opened(tmp_path, processes):
        assert (tmp_path / "metrics.jsonl").read_text() == ""
        assert (tmp_path / "skipped.jsonl").read_text() == ""


def test_a_folder_that_cannot_be_made_is_refused_by_name(tmp_path, processes):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match=r"file/run: cannot be written \(Not a directory\); give another --out"):
        opened(tmp_path / "file" / "run", processes).__enter__()
