"""A run whose features are made to collapse raises the alarm, and a healthy one of the same length does not.

What makes them collapse: clips of one grey, so that the target is a constant that needs nothing of the input, and a
weight decay so strong that the encoder forgets its input. The probe looks at videos that do differ.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main
from pretrain.data.pack import PackConfig, pack
from pretrain.engine.tracking import Tracker, read_metrics
from tests.runs import tiny_pretraining
from tests.videos import make_video

COLLAPSING = ["--optimizer.weight_decay", "60"]


@pytest.fixture(scope="module")
def grey(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("grey")
    for number in range(4):
        make_video(folder / f"videos/{number}.mp4", pictures=np.full((12, 48, 64, 3), 128, dtype=np.uint8))
    pack(PackConfig(source=str(folder / "videos"), out=str(folder / "shards"), jobs=1))
    return str(folder / "shards")


@pytest.fixture(scope="module")
def command(packed_shards, tmp_path_factory) -> list[str]:
    recipe = tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)
    probe = [
        "--probe.shards",
        str(packed_shards),
        "--probe.every",
        "40",
        "--log_every",
        "100",
        "--data.decode_limit_s",
        "0",
    ]
    return [
        "pretrain",
        "--config",
        str(recipe),
        "--steps",
        "120",
        "--optimizer.base_lr",
        "0.3",
        "--data.micro_batch",
        "4",
        *probe,
    ]


def collapsed(out: Path) -> dict[int, int]:
    return {entry["step"]: entry["collapsed"] for entry in read_metrics(out / "metrics.jsonl") if "collapsed" in entry}


def test_features_that_collapse_raise_one_alarm_in_log_record_tracker_and_page(
    command, grey, tmp_path, capsys, monkeypatch
):
    alerts = []
    monkeypatch.setattr(Tracker, "alert", lambda self, title, text: alerts.append((title, text)))
    assert main([*command, *COLLAPSING, "--data.shards", grey, "--out", str(tmp_path / "run")]) == 0
    assert collapsed(tmp_path / "run") == {0: 0, 40: 0, 80: 1, 120: 1}
    warning = "the features have collapsed at step 80: their"
    assert capsys.readouterr().err.count("the features have collapsed") == 1
    ((title, text),) = alerts
    assert title == "The features have collapsed"
    assert text.startswith(warning)
    assert "The features had collapsed at step 80, 120." in (tmp_path / "run" / "report.html").read_text()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["collapsed"] == 1


def test_a_healthy_run_of_the_same_length_raises_none(command, tmp_path, capsys):
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert collapsed(tmp_path / "run") == {0: 0, 40: 0, 80: 0, 120: 0}
    assert "collapsed" not in capsys.readouterr().err


def test_a_run_that_is_to_stop_on_a_collapse_ends_by_rule_with_its_checkpoints_whole(command, grey, tmp_path, capsys):
    out = tmp_path / "run"
    stopping = ["--probe.stop_on_collapse", "true", "--checkpoint.every", "40"]
    assert main([*command, *COLLAPSING, *stopping, "--data.shards", grey, "--out", str(out)]) == 3
    said = capsys.readouterr().err
    assert "tubelet: the features have collapsed at step 80: their" in said
    assert "Traceback" not in said
    assert collapsed(out) == {0: 0, 40: 0, 80: 1}
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == ["step-00000040"]
    assert json.loads((out / "outcome.json").read_text())["exit_code"] == 3
