"""The figures of an evaluation: errors count as wrong, intervals cover, and probabilities are held to account."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy

from finetune.evaluation_page import evaluation_sections
from finetune.figures import VideoLogits, class_mean_interval, figures_of, reliability, wilson_interval
from pretrain.errors import StoppedByRule

BROKEN = VideoLogits(9, "broken", 0, None, "cut short")


def logits_of(label: int, predicted: int) -> VideoLogits:
    return VideoLogits(0, "key", label, np.eye(3, dtype=np.float32)[predicted], None)


def test_errors_count_as_wrong_in_every_figure():
    seen = [
        logits_of(0, 0),
        logits_of(0, 0),
        logits_of(1, 1),
        logits_of(1, 0),
        BROKEN,
    ]
    found = figures_of(seen, ("a", "b", "c"))
    assert found.figures["top1"] == pytest.approx(3 / 5)
    assert found.figures["top5"] == pytest.approx(4 / 5)
    assert found.figures["mean_class_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert (found.figures["samples"], found.figures["errors"]) == (5, 1)
    assert found.confusion.tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    nothing = figures_of([BROKEN], ("a", "b"))
    assert nothing.figures["top1"] == nothing.figures["mean_class_accuracy"] == 0


def test_the_table_of_classes_counts_the_videos_that_could_not_be_decoded():
    seen = [logits_of(0, 0), logits_of(0, 0), *[BROKEN] * 2, logits_of(1, 0)]
    *_, classes = evaluation_sections(figures_of(seen, ("a", "b", "c")), ("a", "b", "c"))
    assert classes.parts[0].rows == [("a", 4, "50.0 %"), ("b", 1, "0.0 %"), ("c", 0, "-")]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_the_evaluation_and_name_the_video(bad):
    broken = VideoLogits(7, "run-7", 0, np.array([bad, 0, 0], dtype=np.float32), None)
    with pytest.raises(StoppedByRule, match=r"^run-7: the model's logits are not finite \(1 of 2 such videos\)"):
        figures_of([logits_of(1, 1), broken], ("a", "b", "c"))


def random_videos(count: int, classes: int, seed: int = 0) -> list[VideoLogits]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    logits = random.normal(size=(count, classes)).astype(np.float32) + 2 * np.eye(classes, dtype=np.float32)[labels]
    return [VideoLogits(place, f"v{place}", int(labels[place]), logits[place], None) for place in range(count)]


def test_accuracies_are_those_of_torchmetrics():
    seen = random_videos(300, 9)
    figures = figures_of(seen, tuple("abcdefghi")).figures
    logits, labels = torch.tensor(np.stack([one.logits for one in seen])), torch.tensor([one.label for one in seen])
    for name, options in (
        ("top1", {"average": "micro"}),
        ("top5", {"average": "micro", "top_k": 5}),
        ("mean_class_accuracy", {"average": "macro"}),
    ):
        assert figures[name] == pytest.approx(multiclass_accuracy(logits, labels, 9, **options).item(), abs=1e-6)
        low, high = figures[f"{name}_interval"]
        assert low < figures[name] < high


def test_the_interval_of_a_share_is_wilsons():
    p, n, z = 0.3, 50, 1.959964
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    assert wilson_interval(15, 50) == pytest.approx([(centre - half) / scale, (centre + half) / scale], abs=1e-6)
    assert wilson_interval(0, 3)[0] == 0
    assert wilson_interval(3, 3)[1] == 1


def test_the_interval_of_the_class_mean_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    truth, videos = random.uniform(0.2, 0.9, 20), random.integers(10, 40, 20)
    covered = 0
    for _ in range(40):
        low, high = class_mean_interval(random.binomial(videos, truth), videos)
        covered += low <= truth.mean() <= high
    assert covered >= 34


def test_the_calibration_error_is_the_distance_from_the_diagonal_in_the_diagram():
    found = figures_of([*random_videos(200, 4), BROKEN], tuple("abcd"))
    bins = reliability(found.predictions)
    assert len(bins) == 15
    assert sum(one.videos for one in bins) == 200
    distance = sum(one.videos * abs(one.probability - one.accuracy) for one in bins if one.videos) / 200
    assert found.figures["calibration_error"] == pytest.approx(distance, abs=1e-5)


def test_predictions_hold_what_the_figures_are_computed_from():
    found = figures_of([*random_videos(60, 8), BROKEN], tuple("abcdefgh"))
    decoded = [one for one in found.predictions if "error" not in one]
    right = sum(one["predicted"] == one["label"] for one in decoded)
    near = sum(one["label"] in [best["class"] for best in one["most_probable"]] for one in decoded)
    assert (right / 61, near / 61) == pytest.approx((found.figures["top1"], found.figures["top5"]))
    loss = -np.mean([math.log(one["label_probability"]) for one in decoded])
    assert found.figures["negative_log_likelihood"] == pytest.approx(loss, abs=1e-4)
    for one in decoded:
        shares = [best["probability"] for best in one["most_probable"]]
        assert shares == sorted(shares, reverse=True)
        assert one["most_probable"][0] == {"class": one["predicted"], "probability": one["probability"]}


def test_the_worst_of_many_classes_come_first_and_the_rest_is_folded_away():
    classes = tuple(f"class {number:02}" for number in range(30))
    found = figures_of([one for one in random_videos(600, 30) if one.label != 4], classes)
    *_, section = evaluation_sections(found, classes)
    (table,) = section.parts
    shares = [float(row[2].removesuffix(" %")) for row in table.rows[:-1]]
    assert shares == sorted(shares)
    assert table.rows[-1] == ("class 04", 0, "-")
    assert table.shown < len(table.rows)


def test_classes_that_are_all_right_or_all_wrong_do_not_make_an_interval_without_width():
    low, high = class_mean_interval(np.array([10, 0, 0]), np.array([10, 10, 0]))
    assert 0.3 < low < 0.4 < 0.6 < high < 0.7
    assert class_mean_interval(np.array([4]), np.array([4])) == wilson_interval(4, 4)
