"""Evaluation where a video has any number of labels: average precision by class, and what a threshold makes of scores.

A score is the sigmoid of a class's logit. Average precision is the area under the curve of precision over recall, as
torchmetrics computes it; its mean is over the classes that have a video, as on Charades and AVA. A video that cannot be
decoded scores 0 for every class, and so stands last.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.errors import StoppedByRule
from pretrain.report import Section, Table

THRESHOLD = 0.5
TITLES = {"mean_average_precision": "mean average precision", "micro_f1": "F1 over all labels"}
"""The shares among the figures, and what they are called."""


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
        figures: `mean_average_precision`, `micro_f1` at the threshold, how many `classes` and `samples`, and `errors`,
            the videos that could not be decoded.
        classes: For each class its name, videos, average precision (None without a video), and precision and recall at
            the threshold (None where nothing is predicted, or nothing is there).
        predictions: For each video its key and labels, and either the classes that reach the threshold and the score of
            each class, or why there are none.
    """

    figures: dict[str, Any]
    classes: list[dict[str, Any]]
    predictions: list[dict[str, Any]]


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
    figures = {
        "mean_average_precision": sum(precisions.values()) / max(len(precisions), 1),
        "micro_f1": _share(2 * right.sum(), predicted.sum() + videos.sum()) or 0.0,
        "classes": len(classes),
        "samples": len(seen),
        "errors": sum(one.logits is None for one in seen),
    }
    predictions = [_prediction(*pair, classes, threshold) for pair in zip(seen, scores.tolist(), strict=True)]
    return LabelsEvaluation(figures, rows, predictions)


def sections_of(evaluation: LabelsEvaluation) -> list[Section]:
    """Returns the table of classes for a page."""
    rows = [
        (one["class"], one["videos"], *(_shown(one[name]) for name in ("average_precision", "precision", "recall")))
        for one in evaluation.classes
    ]
    return [Section("Classes", parts=[Table(("class", "videos", "average precision", "precision", "recall"), rows)])]


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
