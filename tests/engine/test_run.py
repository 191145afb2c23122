"""The life of a run in its folder: claimed, recorded, ended with its outcome, whatever happens in between."""

import errno
import json
import os
import socket

import pytest
import torch

from pretrain.engine.checkpoint import CheckpointConfig
from pretrain.engine.distributed import Processes
from pretrain.engine.manifest import Saved
from pretrain.engine.run import open_run, refuse_other_groups
from pretrain.errors import DiskFull, Refused, StoppedByRule
from pretrain.files import append_json_lines


@pytest.fixture
def processes():
    with Processes() as opened:
        yield opened


def opened(out, processes, identity=None, resume="auto", stage="pretrain"):
    identity = identity or {"seed": 0}
    return open_run(str(out), processes, stage, {"seed": 0}, "seed: 0\n", resume, "none", identity, CheckpointConfig())


def save(run, step: int) -> None:
    model = torch.nn.Linear(2, 2)
    run.checkpoints.save(step, model, torch.optim.AdamW(model.parameters()), run.state)


def outcome(out) -> dict:
    return json.loads((out / "outcome.json").read_text())


def test_an_open_run_is_owned_and_a_closed_one_is_free_and_tells_its_outcome(tmp_path, processes):
    with opened(tmp_path, processes) as run:
        run.begin()
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
        "job": "",
        "restarts": 0,
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": 0.5}
    with opened(tmp_path, processes) as run:
        run.begin()
    assert outcome(tmp_path)["attempt"] == 2
    attempts = [json.loads(line) for line in (tmp_path / "environment.jsonl").read_text().splitlines()]
    assert [entry["attempt"] for entry in attempts] == [1, 2]
    assert attempts[1]["hosts"] == [attempts[1]["hosts"][0] | {"host": socket.gethostname(), "ranks": [0]}]


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
    with opened(tmp_path, processes) as run:
        run.begin()
        assert (tmp_path / "metrics.jsonl").read_text() == ""
        assert (tmp_path / "skipped.jsonl").read_text() == ""


def test_a_start_that_ends_before_it_begins_leaves_the_record_alone(tmp_path, processes):
    with opened(tmp_path, processes) as run:
        run.begin()
        save(run, 1)
    (tmp_path / "config.yaml").write_text("as it was\n")
    append_json_lines(tmp_path / "metrics.jsonl", [{"step": 1}, {"step": 2}])
    before = {name: (tmp_path / name).read_bytes() for name in ("config.yaml", "metrics.jsonl", "outcome.json")}
    with opened(tmp_path, processes):
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
    with pytest.raises(Refused, match=r"seed: is 1, but .*step-00000001 was written with 0"):
        opened(tmp_path, processes, {"seed": 1}).__enter__()
    with pytest.raises(Refused, match="was written by pretrain, not by finetune"):
        opened(tmp_path, processes, stage="finetune").__enter__()
    assert [(tmp_path / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")] == [
        before["config.yaml"],
        before["metrics.jsonl"],
    ]


def test_a_checkpoint_keeps_the_configuration_that_it_was_written_with(tmp_path, processes):
    with opened(tmp_path, processes) as run:
        save(run, 1)
    with opened(tmp_path, processes) as run:
        assert run.saved.state["config"] == {"seed": 0}


def test_a_run_forked_into_another_folder_is_a_run_of_its_own_from_its_first_checkpoint_on(tmp_path, processes):
    with opened(tmp_path / "first", processes) as run:
        run.state["run_id"] = "abcdefgh"
        save(run, 3)
    origin = str(tmp_path / "first" / "checkpoints" / "step-00000003")
    with opened(tmp_path / "fork", processes, resume=origin) as run:
        assert (run.first_step, run.state["run_id"]) == (3, None)
        run.state["run_id"] = "ijklmnop"
        save(run, 5)
    for resume in (origin, "auto", origin):
        with opened(tmp_path / "fork", processes, resume=resume) as run:
            assert (run.first_step, run.state["run_id"]) == (run.saved.step, "ijklmnop")
            assert run.first_step >= 5
            save(run, run.first_step + 1)
    with opened(tmp_path / "first", processes) as run:
        assert (run.first_step, run.state["run_id"]) == (3, "abcdefgh")


def test_what_killed_attempts_left_half_written_is_removed_and_nothing_else(tmp_path, processes):
    left = [tmp_path / name for name in ("metrics.jsonl.tmp-7", "encoder/model.safetensors.tmp-7", "model/a.tmp-7")]
    kept = [tmp_path / name for name in ("notes.txt", "encoder/config.json")]
    for path in left + kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    with opened(tmp_path, processes):
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in kept)


def test_a_folder_that_cannot_be_made_is_refused_by_name(tmp_path, processes):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match=r"file/run: cannot be written \(Not a directory\); give another --out"):
        opened(tmp_path / "file" / "run", processes).__enter__()


def test_every_field_that_differs_is_named_and_only_what_may_change_can_be_insisted_on(tmp_path, processes, caplog):
    def reopened(identity, override):
        return open_run(
            str(tmp_path), processes, "pretrain", {}, "", "auto", "none", identity, CheckpointConfig(),
            overridden={"data.global_batch", "mask.ratio"}, override=override,
        )  # fmt: skip

    written = {"data.shards": "a", "data.global_batch": 4, "mask.ratio": 0.5, "encoder.heads": 2}
    with opened(tmp_path, processes, written) as run:
        save(run, 1)
    checkpoint = f"{tmp_path}/checkpoints/step-00000001"
    harmless = written | {"data.global_batch": 8, "mask.ratio": 0.75}
    told = (
        f"data.global_batch: is 8, but {checkpoint} was written with 4; "
        f"mask.ratio: is 0.75, but {checkpoint} was written with 0.5; "
    )
    with pytest.raises(Refused) as refusal, reopened(harmless, override=False):
        pass
    assert str(refusal.value) == f"{told}use those again, give another --out, or insist with --override_config true"
    with reopened(harmless, override=True) as run:
        assert run.first_step == 1
    assert f"{told[:-2]}; it is changed from here on" in caplog.text
    with (
        pytest.raises(Refused) as refusal,
        reopened(harmless | {"data.shards": "b", "encoder.heads": 4}, override=True),
    ):
        pass
    assert str(refusal.value).startswith(f"data.shards: is b, but {checkpoint} was written with a; {told}encoder.heads")
    assert str(refusal.value).endswith("give another --out; --override_config cannot change data.shards, encoder.heads")


def test_a_checkpoint_whose_optimiser_grouped_the_parameters_otherwise_is_refused(tmp_path):
    groups = [["a.weight", "b.weight"], ["a.bias"]]
    saved = Saved(tmp_path, 1, {"groups": groups})
    refuse_other_groups(saved, groups)
    refuse_other_groups(Saved(tmp_path, 1, {}), groups)
    with pytest.raises(
        Refused, match=r"optimizer.layer_decay: makes 3 groups of parameters, but .* was written with 2"
    ):
        refuse_other_groups(saved, [["a.weight"], ["b.weight"], ["a.bias"]])
    with pytest.raises(Refused, match=r"holds another model than the configuration describes \(a.bias, b.weight of"):
        refuse_other_groups(saved, [["a.weight", "a.bias"], ["b.weight"]])
