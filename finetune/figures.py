"""The figures of an evaluation: accuracies with confidence intervals, and how far the probabilities can be believed.

A video that cannot be decoded has no logits: it counts as wrong in every accuracy and has no part in the two figures on
probabilities. Shares of independent videos have Wilson's score interval (Wilson, JASA 22, 1927); the mean over classes
is no such share and has a percentile interval of the bootstrap that draws anew the videos of each class (Efron and
Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). The calibration error is that of Guo et al.
(arXiv 1706.04599).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.errors import StoppedByRule

TOP = 5
BINS = 15
CONFIDENCE = 0.95
DRAWS = 10_000
INTERVAL = "_interval"
ACCURACIES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_class_accuracy": "mean class accuracy",
}
"""The shares among the figures, and what they are called; each has its interval under its name and `_interval`."""


class VideoLogits(NamedTuple):
    """What the model made of one video.

    Attributes:
        sample: Its sample number.
        key: The video's key.
        label: The number of its class; in a multi-label set the numbers of its classes, which `multi_label.py` takes.
        logits: `(K,)`, the mean over its views; None where it cannot be decoded.
        error: Why it cannot be decoded, or None.
    """

    sample: int
    key: str
    label: Any
    logits: np.ndarray | None
    error: str | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        figures: `top1`, `top5`, `mean_class_accuracy` as shares, each with its 95 % interval, such as `top1_interval`;
            over the decoded videos `calibration_error` and `negative_log_likelihood`, None where there are none; the
            numbers of `classes` and `samples`, and of `errors`: videos that could not be decoded and count as wrong.
        confusion: `(K, K)` counts of the decoded videos; rows are true classes.
        videos: `(K,)` counts of all videos of each class, those included that could not be decoded.
        samples: The sample numbers of all videos.
        predictions: For each of them its key, label, and either the predicted class, its probability, that of the true
            class and the five most probable classes with theirs, or why there is none.
    """

    figures: dict[str, Any]
    confusion: np.ndarray
    videos: np.ndarray
    samples: list[int]
    predictions: list[dict[str, Any]]


def figures_of(seen: Sequence[VideoLogits], classes: tuple[str, ...]) -> Evaluation:
    """Computes the figures from what the model made of all videos.

    Args:
        seen: The logits of every video, or why it has none.
        classes: Names of the classes.

    Raises:
        StoppedByRule: Logits are not finite, so that no class is the most probable.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # takes seconds

    count = len(classes)
    decoded = [one for one in seen if one.logits is not None]
    videos = np.bincount([one.label for one in seen], minlength=count)
    rows = [one.logits for one in seen if one.logits is not None]
    logits = torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, count)
    _stop_if_not_finite(logits, decoded)
    labels = torch.tensor([one.label for one in decoded], dtype=torch.int64)
    ranking = logits.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
    confusion = multiclass_confusion_matrix(ranking[:, 0], labels, count).numpy()
    right = {"top1": int(confusion.trace()), "top5": int((ranking == labels[:, None]).sum())}
    figures: dict[str, Any] = {}
    for name, number in right.items():
        figures |= {name: number / len(seen), name + INTERVAL: wilson_interval(number, len(seen))}
    figures |= {
        "mean_class_accuracy": float((confusion.diagonal()[videos > 0] / videos[videos > 0]).mean()),
        "mean_class_accuracy" + INTERVAL: class_mean_interval(confusion.diagonal(), videos),
        **_figures_of_probabilities(logits, labels),
        "classes": count,
        "samples": len(seen),
        "errors": len(seen) - len(decoded),
    }
    ranked = zip(ranking.tolist(), logits.double().softmax(1).tolist(), strict=True)
    predictions = [
        {"key": one.key, "label": classes[one.label]}
        | ({"error": one.error} if one.logits is None else _prediction(*next(ranked), one.label, classes))
        for one in seen
    ]
    return Evaluation(figures, confusion, videos, [one.sample for one in seen], predictions)


def telling_accuracies(classes: int) -> dict[str, str]:
    """Returns the accuracies to show, and what they are called; of five classes or fewer the best five tell nothing."""
    return {name: title for name, title in ACCURACIES.items() if name != "top5" or classes > TOP}


def _figures_of_probabilities(logits: Tensor, labels: Tensor) -> dict[str, float | None]:
    from torchmetrics.functional.classification import multiclass_calibration_error

    if not len(labels):
        return {"calibration_error": None, "negative_log_likelihood": None}
    error = multiclass_calibration_error(logits.double().softmax(1), labels, logits.shape[1], n_bins=BINS)
    return {
        "calibration_error": error.item(),
        "negative_log_likelihood": torch.nn.functional.cross_entropy(logits.double(), labels).item(),
    }


def _prediction(ranking: list[int], probabilities: list[float], label: int, classes: tuple[str, ...]) -> dict[str, Any]:
    most_probable = [{"class": classes[one], "probability": _rounded(probabilities[one])} for one in ranking]
    return {
        "predicted": classes[ranking[0]],
        "probability": _rounded(probabilities[ranking[0]]),
        "label_probability": _rounded(probabilities[label]),
        "most_probable": most_probable,
    }


def _rounded(probability: float) -> float:
    return float(f"{probability:.6g}")


def wilson_interval(right: int, videos: int) -> list[float]:
    """Returns the bounds of the 95 % score interval of a share of independent videos."""
    from scipy.stats import binomtest

    interval = binomtest(right, videos).proportion_ci(CONFIDENCE, method="wilson")
    return [float(interval.low), float(interval.high)]


def class_mean_interval(right: np.ndarray, videos: np.ndarray) -> list[float]:
    """Returns the bounds of the 95 % bootstrap interval of the mean class accuracy.

    Drawing anew the videos of a class draws a binomial number of right ones. With a handful of videos in each class the
    interval is too narrow. Where every class is all right or all wrong all draws are alike; the bounds are then the
    means of those of Wilson's intervals of the classes, which is too wide.

    Args:
        right: `(K,)` right videos of each class.
        videos: `(K,)` videos of each class; those without any have no part.
    """
    right, videos = right[videos > 0], videos[videos > 0]
    if ((right == 0) | (right == videos)).all():
        alone = [wilson_interval(int(hits), int(count)) for hits, count in zip(right, videos, strict=True)]
        return [float(bound) for bound in np.mean(alone, axis=0)]
    drawn = np.random.default_rng(0).binomial(videos, right / videos, size=(DRAWS, len(videos)))
    return percentile_interval((drawn / videos).mean(1))


def percentile_interval(drawn: np.ndarray) -> list[float]:
    """Returns the bounds between which 95 % of a bootstrap's values `(draws,)` lie."""
    tail = (1 - CONFIDENCE) / 2
    return [float(bound) for bound in np.quantile(drawn, (tail, 1 - tail))]


class ReliabilityBin(NamedTuple):
    """The videos whose predicted class had a probability within a bin.

    Attributes:
        videos: How many.
        probability: The mean probability of the predicted class.
        accuracy: The share of which the predicted class is right.
    """

    videos: int
    probability: float
    accuracy: float


def reliability(predictions: Sequence[dict[str, Any]]) -> list[ReliabilityBin]:
    """Sorts the decoded videos into 15 bins by the probability of the predicted class; nan where a bin is empty."""
    decoded = [one for one in predictions if "predicted" in one]
    probability = np.array([one["probability"] for one in decoded])
    right = np.array([one["predicted"] == one["label"] for one in decoded], dtype=float)
    edges = np.linspace(0, 1, BINS + 1)[1:-1]
    places = np.searchsorted(edges, probability) if decoded else np.zeros(0, dtype=int)
    bins = [places == number for number in range(BINS)]
    return [
        ReliabilityBin(int(own.sum()), float(probability[own].mean()), float(right[own].mean()))
        if own.any()
        else ReliabilityBin(0, math.nan, math.nan)
        for own in bins
    ]


def _stop_if_not_finite(logits: Tensor, decoded: list[VideoLogits]) -> None:
    bad = (~logits.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise StoppedByRule(
            f"{decoded[bad[0]].key}: the model's logits are not finite ({len(bad)} of {len(decoded)} such videos); "
            f"finetune again with a lower optimizer.base_lr"
        )
