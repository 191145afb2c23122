"""The demo from videos to page, small, and what it does with an earlier one's folder."""

import json

import pytest

from launch import demo
from launch.demo import DemoConfig
from pretrain.engine.tracking import read_metrics
from pretrain.errors import Refused


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "VIDEOS", {"unlabelled": 16, "labelled": 16, "validation": 8, "test": 8})
    monkeypatch.setattr(demo, "FINETUNING_SEEDS", (0,))
    monkeypatch.setattr(demo, "SCRATCH_RATES", ("3.2e-2",))


def test_the_demo_goes_from_videos_to_a_page(small, tmp_path):
    out = tmp_path / "demo"
    summary = demo.demo(DemoConfig(out=str(out), steps=4, jobs=1))
    assert summary == json.loads((out / "summary.json").read_text())
    assert len(summary["top1_pretrained_by_seed"]) == len(summary["top1_scratch_by_seed"]) == 1
    for name in ("top1_pretrained", "top1_scratch", "knn_pretrained", "knn_untrained"):
        assert 0 <= summary[name] <= 1
    metrics = read_metrics(out / "pretrain" / "metrics.jsonl")
    assert [entry["step"] for entry in metrics][-1] == 4
    assert [entry["step"] for entry in metrics if "probe_knn" in entry] == [0, 4]
    page = (out / "report.html").read_text()
    assert f"{100 * summary['top1_pretrained']:.1f} %" in page
    assert "Pretraining: k-NN accuracy" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert not (out / "videos").exists()


@pytest.mark.parametrize(
    ("earlier", "left"), [({"seed": 3}, True), ({"seed": 3, "jobs": 7}, True), ({"seed": 4}, False)]
)
def test_an_interrupted_demo_of_the_same_seed_is_left_to_go_on(tmp_path, earlier, left):
    demo._clear_unless_interrupted(tmp_path, DemoConfig(out=str(tmp_path), **earlier))
    (tmp_path / "shards").mkdir()
    demo._clear_unless_interrupted(tmp_path, DemoConfig(out=str(tmp_path), seed=3))
    assert (tmp_path / "shards").exists() == left


def test_a_finished_demo_is_made_anew_and_a_foreign_folder_is_kept(tmp_path):
    config = DemoConfig(out=str(tmp_path))
    (tmp_path / "foreign").write_text("mine")
    demo._clear_unless_interrupted(tmp_path, config)
    assert (tmp_path / "foreign").exists()
    (tmp_path / "summary.json").write_text("{}")
    demo._clear_unless_interrupted(tmp_path, config)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(("field", "value"), [("seed", -1), ("jobs", -1)])
def test_what_cannot_be_is_refused_before_a_video_is_made(tmp_path, field, value):
    with pytest.raises(Refused, match=f"{field}: -1 must not be negative"):
        demo.demo(DemoConfig(out=str(tmp_path / "demo"), **{field: value}))
    assert not (tmp_path / "demo").exists()
