"""Every page opened from disk in a real Chromium: whole, quiet, asking for nothing, on a desk and on a telephone."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from finetune.evaluation_page import write_evaluation
from finetune.figures import VideoLogits, figures_of
from launch.cli import main
from tests.finetune.test_compare import evaluated
from tests.pages.opened_page import faults_of

VIEWS = list(itertools.product((1280, 400), ("light", "dark")))


def all_faults(browser, file: Path, name: str, screenshots: Path) -> list[str]:
    return [
        f"{width_px} px, {scheme}: {fault}"
        for width_px, scheme in VIEWS
        for fault in faults_of(browser, file, width_px, scheme, screenshots / f"{name}-{width_px}-{scheme}.png")
    ]


def test_the_page_of_pretraining_is_whole(browser, pretrained, screenshots):
    assert "<img" in (pretrained / "report.html").read_text()
    assert all_faults(browser, pretrained / "report.html", "pretraining", screenshots) == []


def test_the_pages_of_finetuning_and_of_an_evaluation_are_whole(browser, finetuned, packed_shards, screenshots):
    command = ["evaluate", "--model", str(finetuned), "--shards", str(packed_shards), "--workers", "0"]
    assert main([*command, "--views.temporal", "2", "--views.spatial", "3"]) == 0
    for name, file in (("finetuning", "report.html"), ("evaluation", "evaluation/report.html")):
        content = (finetuned / file).read_text()
        assert content.count("<img") >= 1, "the hardest videos are shown"
        assert "Calibration" in content
        assert "Learning rate" in content
        assert all_faults(browser, finetuned / file, name, screenshots) == []


@pytest.mark.parametrize("count", [51, 101, 400])
def test_the_page_of_an_evaluation_on_many_classes_is_whole(browser, count, tmp_path, screenshots):
    random = np.random.default_rng(count)
    classes = tuple(f"playing the {'very ' * (number % 4)}long instrument {number}" for number in range(count))
    logits = random.normal(size=(4 * count, count)).astype(np.float32)
    logits[range(4 * count), np.arange(4 * count) % count] += 3
    seen = [VideoLogits(place, f"video {place}", place % count, row, None) for place, row in enumerate(logits)]
    record = {"shards": "shards/test", "views": {"temporal": 5, "spatial": 3}}
    write_evaluation(tmp_path, figures_of(seen, classes), classes, record)
    assert all_faults(browser, tmp_path / "report.html", f"evaluation-{count}", screenshots) == []


def test_the_page_of_a_comparison_is_whole(browser, tmp_path, screenshots):
    settings = "seed: {}\noptimizer: {{base_lr: {}}}\nencoder: {}\ndata: {{shards: a/rather/long/path/of/shards/{}}}\n"
    groups: list[str] = []
    for name, share, rate in (("scratch", 0.5, "1e-2"), ("linear probe", 0.6, "1e-3"), ("finetuned", 0.7, "5e-4")):
        groups += ["--group", name]
        for seed in range(3):
            right = np.random.default_rng(seed).random(140) < share
            config = settings.format(seed, rate, f"runs/{name}", name)
            groups.append(str(evaluated(tmp_path / name / str(seed), right, config)))
    assert main(["compare", *groups, "--out", str(tmp_path / "out")]) == 0
    assert all_faults(browser, tmp_path / "out" / "report.html", "comparison", screenshots) == []


def test_what_is_wrong_with_a_page_is_found(browser, tmp_path):
    (tmp_path / "bad.html").write_text(
        "<!doctype html><link rel=stylesheet href='http://127.0.0.1:9/style.css'><img src='missing.png' alt='strip'>"
        "<svg aria-label='empty'></svg><div style='width: 2000px'>wide</div><script>missing()</script>"
    )
    found = " ".join(faults_of(browser, tmp_path / "bad.html", 400, "light", tmp_path / "bad.png"))
    for expected in (
        "asks for http://127.0.0.1:9/style.css",
        "missing.png",
        "not drawn: strip",
        "not drawn: empty",
        "px wide",
        "missing is not defined",
    ):
        assert expected in found
