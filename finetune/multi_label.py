"""Evaluation where a video has any number of labels: average precision by class, and what a threshold makes of scores.

A score is the sigmoid of a class's logit. Average precision is the area under the curve of precision over recall, as
torchmetrics computes it; its mean is over the classes that have a video, as on Charades and AVA. A video that cannot be
decoded scores 0 for every class, and so stands last. Intervals are percentile intervals of the bootstrap over videos
(Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune.figures import INTERVAL, percentile_interval
from pretrain.errors import StoppedByRule
from pretrain.report import Section, Table

THRESHOLD = 0.5
TITLES = {"mean_average_precision": "mean average precision", "micro_f1": "F1 over all labels"}
"""The shares among the figures, and what they are called; each has its interval under its name and `_interval`."""
LABEL_DRAWS = 1000
"""How often the videos are drawn anew; each time all are ranked for each class."""
COUNTED_AT_ONCE = 2**16
"""Videos of all draws that are counted together, which stay in the processor's cache."""


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
    drawn = drawn_figures(Scores(scores.numpy(), predicted.numpy(), labels.bool().numpy()))
    intervals = {name + INTERVAL: percentile_interval(values[1:]) for name, values in drawn.items()}
    figures = {
        "mean_average_precision": sum(precisions.values()) / max(len(precisions), 1),
        "micro_f1": _share(2 * right.sum(), predicted.sum() + videos.sum()) or 0.0,
        **intervals,
        "classes": len(classes),
        "samples": len(seen),
        "errors": sum(one.logits is None for one in seen),
        "threshold": threshold,
    }
    predictions = [_prediction(*pair, classes, threshold) for pair in zip(seen, scores.tolist(), strict=True)]
    return LabelsEvaluation(figures, rows, predictions)


def drawn_figures(seen: Scores, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns the shares among the figures of a set's videos, and then of as many that are drawn from them anew.

    Args:
        seen: What a model made of them.
        seed: One seed draws the same videos, whatever a model made of them.

    Returns:
        For each of `TITLES` the values `(1 + LABEL_DRAWS,)`.
    """
    rankings = [_ranking(*column) for column in zip(seen.scores.T, seen.labels.T, strict=True) if column[1].any()]
    right, told = (seen.predicted & seen.labels).sum(1), (seen.predicted.astype(int) + seen.labels).sum(1)
    precisions, shares = [], []
    for counts in _drawn_counts(len(seen.labels), seed):
        precisions.append(_mean_average_precision(rankings, counts))
        shares.append(2 * (counts @ right) / np.maximum(counts @ told, 1))
    return {"mean_average_precision": np.concatenate(precisions), "micro_f1": np.concatenate(shares)}


def _drawn_counts(videos: int, seed: int) -> Iterator[np.ndarray]:
    """Yields how often each video is there, `(draws, videos)`: once, and then as often as it is drawn."""
    yield np.ones((1, videos), np.int64)
    random, even = np.random.default_rng(seed), np.full(videos, 1 / videos)
    at_once = max(COUNTED_AT_ONCE // videos, 1)
    for start in range(0, LABEL_DRAWS, at_once):
        yield random.multinomial(videos, even, size=min(at_once, LABEL_DRAWS - start))


class _Ranking(NamedTuple):
    """The videos by the score of one class.

    Attributes:
        order: Their numbers, the greatest score first.
        own: The places in it of those that have the class.
        ends: For each of these the last place with the same score.
        found: For each of these how many of them stand no later than that place, less one.
    """

    order: np.ndarray
    own: np.ndarray
    ends: np.ndarray
    found: np.ndarray


def _ranking(scores: np.ndarray, labels: np.ndarray) -> _Ranking:
    order = np.argsort(-scores, kind="stable")
    last_of_equals = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    own = np.flatnonzero(labels[order])
    ends = last_of_equals[np.searchsorted(last_of_equals, own)]
    return _Ranking(order, own, ends, np.searchsorted(own, ends, side="right") - 1)


def _mean_average_precision(rankings: Sequence[_Ranking], counts: np.ndarray) -> np.ndarray:
    """Returns the mean `(draws,)` over the classes that a drawn video has; 0 where none has any."""
    total, classes = np.zeros(len(counts)), np.zeros(len(counts))
    for order, own, ends, found in rankings:
        ranked = counts[:, order]
        here = ranked[:, own]
        precision = here.cumsum(1)[:, found] / np.maximum(ranked.cumsum(1)[:, ends], 1)
        there = here.sum(1)
        total += (here * precision).sum(1) / np.maximum(there, 1)
        classes += there > 0
    return total / np.maximum(classes, 1)


def sections_of(evaluation: LabelsEvaluation) -> list[Section]:
    """Returns the table of classes for a page."""
    rows = [
        (one["class"], one["videos"], *(_shown(one[name]) for name in ("average_precision", "precision", "recall")))
        for one in evaluation.classes
    ]
    note = f"Precision and recall of classes whose score reaches {evaluation.figures['threshold']:g}."
    return [
        Section("Classes", parts=[Table(("class", "videos", "average precision", "precision", "recall"), rows, note)])
    ]


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
    rounded = {name: float(f"{score:.6g}") for name, score in zip(classes, scores, strict=True)}
    return told | {"predicted": predicted, "scores": rounded}


def _share(part: Tensor, whole: Tensor) -> float | None:
    return float(part) / float(whole) if whole else None


def _shown(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
