"""Evaluation where a video has any number of labels: average precision by class, and what a threshold makes of scores.

A score is the sigmoid of a class's logit. Average precision is the area under the curve of precision over recall, as
torchmetrics computes it; its mean is over the classes that have a video, as on Charades and AVA. A video that cannot be
decoded scores 0 for every class, and so stands last.

Intervals are those of the infinitesimal jackknife, or nonparametric delta method (Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993, chapter 22): a figure's derivatives by the weight of each video give its standard
error. A bootstrap would not do: a video that is drawn twice stands twice at one place of the ranking, which raises
average precision, so that where classes have few videos the interval lies above the figure itself.
"""

import dataclasses
from collections.abc import Container, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune.figures import CONFIDENCE, INTERVAL
from pretrain.errors import StoppedByRule
from pretrain.report import Section, Table

THRESHOLD = 0.5
TITLES = {"mean_average_precision": "mean average precision", "micro_f1": "F1 over all labels"}
"""The shares among the figures, and what they are called; each has its interval under its name and `_interval`."""
STANDARD_ERRORS = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
"""Half the width of a normal distribution's interval."""


@dataclasses.dataclass(frozen=True)
class ScoredVideo:
    """What the model made of one video.

    Attributes:
        key: The video's key.
        labels: The numbers of its classes.
        logits: `(K,)`, the mean over its views; None where it cannot be decoded.
        error: Why it cannot be decoded, or None.
    """

    key: str
    labels: tuple[int, ...]
    logits: np.ndarray | None
    error: str | None


@dataclasses.dataclass(frozen=True)
class LabelsEvaluation:
    """What an evaluation of a multi-label set found.

    Attributes:
        figures: `mean_average_precision`, and `micro_f1` at the `threshold`, each with its 95 % interval, such as
            `micro_f1_interval`; how many `classes` and `samples`, and `errors`, the videos that could not be decoded.
        classes: For each class its name, videos, average precision (None without a video), and precision and recall at
            the threshold (None where nothing is predicted, or nothing is there).
        predictions: For each video its key and labels, and either the classes that reach the threshold and the score of
            each class, or why there are none.
    """

    figures: dict[str, Any]
    classes: list[dict[str, Any]]
    predictions: list[dict[str, Any]]


class Scores(NamedTuple):
    """What a model made of a set.

    Attributes:
        scores: `(videos, K)`, the score of each class.
        predicted: `(videos, K)` whether it reaches the threshold.
        labels: `(videos, K)` whether the video has the class.
    """

    scores: np.ndarray
    predicted: np.ndarray
    labels: np.ndarray


def evaluate_labels(
    seen: Sequence[ScoredVideo], classes: tuple[str, ...], threshold: float = THRESHOLD
) -> LabelsEvaluation:
    """Computes the figures from what the model made of all videos.

    Args:
        seen: The logits of every video, or why it has none.
        classes: Names of the classes.
        threshold: The least score of a class that is predicted.

    Raises:
        StoppedByRule: Logits are not finite.
    """
    from torchmetrics.functional.classification import binary_average_precision  # takes seconds

    scores = torch.stack([_scores(one, len(classes)) for one in seen])
    labels = torch.tensor([[int(number in one.labels) for number in range(len(classes))] for one in seen])
    videos = labels.sum(0)
    precisions = {
        number: binary_average_precision(scores[:, number], labels[:, number]).item()
        for number in videos.nonzero().flatten().tolist()
    }
    predicted = scores >= threshold
    right = (predicted & labels.bool()).sum(0)
    rows = [
        {
            "class": name,
            "videos": int(videos[number]),
            "average_precision": precisions.get(number),
            "precision": _share(right[number], predicted[:, number].sum()),
            "recall": _share(right[number], videos[number]),
        }
        for number, name in enumerate(classes)
    ]
    found = estimates_of(Scores(scores.numpy(), predicted.numpy(), labels.bool().numpy()))
    figures = {
        **{name: float(one.value) for name, one in found.items()},
        **{name + INTERVAL: [min(max(bound, 0.0), 1.0) for bound in one.interval] for name, one in found.items()},
        "classes": len(classes),
        "samples": len(seen),
        "errors": sum(one.logits is None for one in seen),
        "threshold": threshold,
    }
    predictions = [_prediction(*pair, classes, threshold) for pair in zip(seen, scores.tolist(), strict=True)]
    return LabelsEvaluation(figures, rows, predictions)


def is_multi_label(figures: Container[str]) -> bool:
    """Whether figures are those of a multi-label set, by their names."""
    return "mean_average_precision" in figures


class Estimate(NamedTuple):
    """A figure, or a sum of figures, and what each video has to do with it.

    Attributes:
        value: The figure.
        slopes: `(videos,)`, its derivative by the weight of each video, all of which are 1.
    """

    value: float
    slopes: np.ndarray

    @property
    def interval(self) -> list[float]:
        """The bounds of its 95 % interval."""
        half = STANDARD_ERRORS * float(np.sqrt(np.square(self.slopes).sum()))
        return [self.value - half, self.value + half]


def estimates_of(seen: Scores) -> dict[str, Estimate]:
    """Returns the shares among the figures of a set, `TITLES`, by what a model made of its videos."""
    columns = zip(seen.scores.T, seen.labels.T, strict=True)
    of_classes = [_average_precision(scores, labels) for scores, labels in columns if labels.any()]
    nothing = Estimate(0.0, np.zeros(len(seen.labels)))
    mean = Estimate(*(np.mean(part, axis=0) for part in zip(*of_classes, strict=True))) if of_classes else nothing
    right, told = (seen.predicted & seen.labels).sum(1), (seen.predicted.astype(int) + seen.labels).sum(1)
    share = 2 * right.sum() / max(told.sum(), 1)
    f1 = Estimate(float(share), (2 * right - share * told) / max(told.sum(), 1))
    return {"mean_average_precision": mean, "micro_f1": f1}


def _average_precision(scores: np.ndarray, labels: np.ndarray) -> Estimate:
    """Returns the average precision of a class that has videos: the mean of `found / taken` over these.

    Of a video of the class, `taken` counts the videos with its score or a greater one, and `found` those of the class
    among them.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, own = scores[order], np.flatnonzero(labels[order])
    taken = np.searchsorted(-ranked, -ranked[own], side="right")
    found = np.searchsorted(own, taken)
    precision = found / taken
    value = precision.mean()
    # A video is among those taken, and may be among those found, for each video of the class that scores no more.
    lower = np.searchsorted(-ranked[own], -scores)
    fewer = _sums_from(precision / taken)[lower]
    more = _sums_from(1 / taken)[lower]
    slopes = np.where(labels, more, 0.0) - fewer
    slopes[order[own]] += precision - value
    return Estimate(value, slopes / len(own))


def _sums_from(values: np.ndarray) -> np.ndarray:
    """Returns `(n + 1,)`: the sum of the values from each place on."""
    return np.append(values[::-1].cumsum()[::-1], 0.0)


def sections_of(evaluation: LabelsEvaluation) -> list[Section]:
    """Returns the table of classes for a page."""
    rows = [
        (one["class"], one["videos"], *(_shown(one[name]) for name in ("average_precision", "precision", "recall")))
        for one in evaluation.classes
    ]
    header = ("class", "videos", "average precision", "precision", "recall")
    note = (
        f"Precision and recall are those of classes whose score reaches {evaluation.figures['threshold']:g}. The "
        "intervals of the mean and of F1 cover 95 %, by the infinitesimal jackknife over videos. They do not tell that "
        "average precision itself comes out too high for classes with a handful of videos."
    )
    return [Section("Classes", parts=[Table(header, rows, note)])]


def _scores(one: ScoredVideo, count: int) -> Tensor:
    if one.logits is None:
        return torch.zeros(count, dtype=torch.float64)
    logits = torch.from_numpy(one.logits).double()
    if not logits.isfinite().all():
        raise StoppedByRule(
            f"{one.key}: the model's logits are not finite; finetune again with a lower optimizer.base_lr"
        )
    return logits.sigmoid()


def _prediction(one: ScoredVideo, scores: list[float], classes: tuple[str, ...], threshold: float) -> dict[str, Any]:
    told = {"key": one.key, "labels": [classes[number] for number in one.labels]}
    if one.logits is None:
        return told | {"error": one.error}
    predicted = [name for name, score in zip(classes, scores, strict=True) if score >= threshold]
    return told | {"predicted": predicted, "scores": dict(zip(classes, scores, strict=True))}


def _share(part: Tensor, whole: Tensor) -> float | None:
    return float(part) / float(whole) if whole else None


def _shown(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
