"""Figures of multi-label sets: by their definitions, with intervals, read back, and compared between runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from finetune.compare import compare
from finetune.evaluation_page import write_result
from finetune.multi_label import ScoredVideo, Scores, estimates_of, evaluate_labels
from launch.cli import main
from pretrain.errors import StoppedByRule
from tests.finetune.test_compare import alter_line
from tests.finetune.test_compare import evaluated as evaluated_alone


def video(key: str, labels: tuple[int, ...], *scores: float) -> ScoredVideo:
    return ScoredVideo(key, labels, np.log(np.array(scores) / (1 - np.array(scores))), None)


def test_average_precision_is_that_of_the_ranking_and_a_video_that_cannot_be_decoded_is_last():
    seen = [
        video("a", (0,), 0.9, 0.2, 0.6),
        video("b", (1,), 0.8, 0.6, 0.4),
        video("c", (0,), 0.7, 0.1, 0.4),
        ScoredVideo("d", (0, 1), None, "cut short"),
    ]
    found = evaluate_labels(seen, ("x", "y", "z"))
    of_x, of_y, of_z = found.classes
    assert of_x["average_precision"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)
    assert of_y["average_precision"] == pytest.approx((1 / 1 + 2 / 4) / 2)
    assert (of_z["videos"], of_z["average_precision"], of_z["recall"], of_z["precision"]) == (0, None, None, 0)
    assert (of_x["precision"], of_x["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found.figures["mean_average_precision"] == pytest.approx(
        (of_x["average_precision"] + of_y["average_precision"]) / 2
    )
    assert found.figures["micro_f1"] == pytest.approx(2 * 3 / (5 + 5))
    assert (found.figures["samples"], found.figures["errors"]) == (4, 1)
    assert found.predictions[3] == {"key": "d", "labels": ["x", "y"], "error": "cut short"}
    assert found.predictions[0]["predicted"] == ["x", "z"]


def weighted(seen: Scores, weights: np.ndarray) -> list[float]:
    """Mean average precision and F1 by their definitions, where each video counts by its weight."""
    of_classes = []
    for scores, labels in zip(seen.scores.T, seen.labels.T, strict=True):
        own = weights * labels
        precisions = [own[scores >= score].sum() / weights[scores >= score].sum() for score in scores]
        of_classes += [(own * precisions).sum() / own.sum()] if labels.any() else []
    hits, told = (seen.predicted & seen.labels).sum(1), seen.predicted.sum(1) + seen.labels.sum(1)
    return [float(np.mean(of_classes)), 2 * (weights @ hits) / (weights @ told)]


def test_figures_and_what_each_video_has_to_do_with_them_follow_from_their_definitions():
    random = np.random.default_rng(0)
    labels = random.random((50, 4)) < (0.5, 0.2, 0.04, 0)
    scores = random.random((50, 4)).round(1)  # many are equal
    seen = Scores(scores, scores >= 0.4, labels)
    found = list(estimates_of(seen).values())
    expected = weighted(seen, np.ones(50))
    assert [one.value for one in found] == pytest.approx(expected)
    for video_number in range(50):
        slightly = np.ones(50)
        slightly[video_number] += 1e-6
        slopes = (np.array(weighted(seen, slightly)) - expected) / 1e-6
        assert [one.slopes[video_number] for one in found] == pytest.approx(slopes, abs=1e-6)


def test_intervals_are_as_wide_as_the_figures_of_other_videos_vary():
    found = [estimates_of(Scores(scores, scores >= 0.6, labels)) for labels, scores in map(scored_anew, range(200))]
    for name in ("mean_average_precision", "micro_f1"):
        values = np.array([one[name].value for one in found])
        intervals = np.array([one[name].interval for one in found])
        assert (intervals[:, 1] - intervals[:, 0]).mean() / 2 / 1.96 == pytest.approx(values.std(), rel=0.15)
        within = (intervals[:, 0] < values.mean()) & (values.mean() < intervals[:, 1])
        assert 0.9 < within.mean() < 0.99


def test_sets_without_labels_predictions_or_decoded_videos_have_figures():
    nothing = np.zeros((3, 2), dtype=bool)
    for seen in (
        Scores(np.full((3, 2), 0.2), nothing, nothing),
        Scores(np.full((3, 2), 0.2), nothing, ~nothing),
        Scores(np.zeros((3, 0)), nothing[:, :0], nothing[:, :0]),
    ):
        for one in estimates_of(seen).values():
            assert np.isfinite(one.interval).all()
            assert len(one.slopes) == 3


def evaluated(folder: Path, labels: np.ndarray, scores: np.ndarray, threshold: float = 0.5, name: str = "v") -> str:
    """A run's folder whose model gave these scores; the last video could not be decoded."""
    seen = [
        video(f"{name}{place}", tuple(np.flatnonzero(own).tolist()), *scores[place]) for place, own in enumerate(labels)
    ]
    seen[-1] = ScoredVideo(seen[-1].key, seen[-1].labels, None, "cut short")
    folder.mkdir(parents=True)
    record = {"shards": "sets/test", "split": name, "fingerprint": "f" * 64, "views": {}}
    write_result(folder, evaluate_labels(seen, ("x", "y", "z"), threshold), record)
    return str(folder)


def scored(seed: int, videos: int = 300, skill: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and scores that follow them by so much."""
    labels = np.random.default_rng(videos).random((videos, 3)) < (0.5, 0.3, 0.2)
    noise = np.random.default_rng(seed).normal(size=(videos, 3))
    return labels, 1 / (1 + np.exp(-(noise + skill * (labels - 0.5))))


def scored_anew(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of other videos for each seed, and scores of them; each class has some 15 videos."""
    random = np.random.default_rng(seed)
    labels = random.random((150, 6)) < 0.1
    return labels, 1 / (1 + np.exp(-(random.normal(size=(150, 6)) + 1.5 * labels)))


def test_runs_on_a_multi_label_set_are_compared_by_average_precision_paired_video_by_video(tmp_path, capsys):
    labels, scores = scored(0, skill=1)
    better = np.where(labels, scores + 0.05 * (1 - scores), scores)
    runs = [evaluated(tmp_path / "first", labels, scores), evaluated(tmp_path / "better", labels, better)]
    other = evaluated(tmp_path / "other", *scored(1, skill=1.1))
    found = compare([("first", runs[:1]), ("better", runs[1:]), ("other", [other])]).found
    for place, run in enumerate((*runs, other)):
        record = json.loads((Path(run) / "evaluation.json").read_text())
        for name in ("mean_average_precision", "micro_f1"):
            figure = found.figures[place][name]
            assert figure.value == pytest.approx(record[name], abs=1e-6)
            assert figure.interval == record[f"{name}_interval"]
            assert record[f"{name}_interval"][0] < record[name] < record[f"{name}_interval"][1]
    paired, unpaired = (row["mean_average_precision"] for row in found.differences)
    assert 0 < paired.interval[0] < paired.value < paired.interval[1]
    assert paired.interval[1] - paired.interval[0] < (unpaired.interval[1] - unpaired.interval[0]) / 3
    assert found.discordant == [None, None]
    (tmp_path / "out").mkdir()
    assert main(["compare", *runs, other, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "mean average precision" in told
    assert "top-1" not in told + (tmp_path / "out" / "report.html").read_text()


def test_groups_of_folds_and_seeds_of_a_multi_label_set_have_the_means_over_their_runs(tmp_path):
    groups = {
        name: [
            evaluated(tmp_path / f"{name}-{fold}-{seed}", *scored(seed, 40 + fold, skill), threshold, f"fold{fold}-")
            for fold in range(3)
            for seed in range(2)
        ]
        for name, skill, threshold in (("low", 0.5, 0.5), ("high", 2, 0.4))
    }
    comparison = compare([("low", groups["low"]), ("high", groups["high"][::-1])])
    found = comparison.found
    for place, runs in enumerate(groups.values()):
        own = [json.loads((Path(run) / "evaluation.json").read_text())["micro_f1"] for run in runs]
        figure = found.figures[place]["micro_f1"]
        assert (figure.value, figure.deviation) == (pytest.approx(np.mean(own)), pytest.approx(np.std(own, ddof=1)))
    assert found.differences[0]["mean_average_precision"].interval[0] > 0
    assert comparison.settings["threshold"] == [[0.5] * 6, [0.4] * 6]
    copies = [
        ("one", groups["low"][:1]),
        ("same", [shutil.copytree(groups["low"][0], tmp_path / f"{n}") for n in "ab"]),
    ]
    same = compare(copies).found
    assert same.figures[1]["micro_f1"].interval == pytest.approx(same.figures[0]["micro_f1"].interval)
    assert same.differences[0]["micro_f1"][:2] == (0, [0, 0]), "nothing differs, so other videos change nothing"


def test_confident_scores_are_read_back_as_they_were(tmp_path):
    labels, scores = scored(2, skill=1)
    folders = []
    for name, logits in (("plain", np.log(scores / (1 - scores))), ("sure", np.log(scores / (1 - scores)) + 16)):
        seen = [
            ScoredVideo(f"v{n}", tuple(np.flatnonzero(own).tolist()), logits[n], None) for n, own in enumerate(labels)
        ]
        (tmp_path / name).mkdir()
        record = {"shards": "sets/test", "split": "v", "fingerprint": "f" * 64, "views": {}}
        write_result(tmp_path / name, evaluate_labels(seen, ("x", "y", "z")), record)
        folders.append(str(tmp_path / name))
    one, other = compare([("plain", folders[:1]), ("sure", folders[1:])]).found.figures
    assert one["mean_average_precision"].value == pytest.approx(other["mean_average_precision"].value)


@pytest.mark.parametrize(
    "fields",
    [
        {"labels": "x"},
        {"labels": [3]},
        {"labels": ["w"]},
        {"scores": [0.5, 0.5, 0.5]},
        {"scores": {"x": 0.5, "y": 0.5}},
        {"scores": {"x": float("nan"), "y": 0.5, "z": 0.5}},
        {"scores": {"x": 1.5, "y": 0.5, "z": 0.5}},
        {"scores": {"x": True, "y": 0.5, "z": 0.5}},
        {"scores": None},
        {"predicted": ["w"]},
        {"predicted": None},
    ],
)
def test_a_line_of_scores_that_cannot_be_is_named(tmp_path, capsys, fields):
    runs = [evaluated(tmp_path / name, *scored(0, 5)) for name in "ab"]
    alter_line(Path(runs[1]), **fields)
    assert main(["compare", *runs, "--out", str(tmp_path / "out")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{runs[1]}/predictions.jsonl: line 1 is no prediction" in said


def test_other_classes_and_other_kinds_of_sets_are_refused(tmp_path, capsys):
    several = [evaluated(tmp_path / name, *scored(0, 5)) for name in "ab"]
    single = [evaluated_alone(tmp_path / name, np.array([True, False])) for name in "cd"]
    for groups in ((several[0], single[0]), (single[0], several[0])):
        assert main(["compare", *map(str, groups), "--out", str(tmp_path / "out")]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert f"{several[0]}: was evaluated on a multi-label set, and {single[0]} on one label a video" in said
    mixed = [
        part
        for name, pair in zip("xy", zip(several, single, strict=True), strict=True)
        for part in ("--group", name, *map(str, pair))
    ]
    assert main(["compare", *mixed, "--out", str(tmp_path / "out")]) == 2
    assert "was evaluated on a multi-label set" in capsys.readouterr().err
    file = Path(several[1]) / "predictions.jsonl"
    first, rest = file.read_text().split("\n", 1)
    file.write_text(first.replace('"z"', '"w"') + "\n" + rest)
    assert main(["compare", *several, "--out", str(tmp_path / "out")]) == 2
    assert "has other classes than the videos before it" in capsys.readouterr().err


def test_scores_that_are_not_finite_stop_the_evaluation_and_name_the_video():
    broken = ScoredVideo("run-7", (0,), np.array([np.nan, 0.0]), None)
    with pytest.raises(StoppedByRule, match=r"^run-7: the model's logits are not finite"):
        evaluate_labels([broken], ("x", "y"))
