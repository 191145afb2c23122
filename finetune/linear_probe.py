"""The linear probe: multinomial logistic regression on frozen features.

Features are standardised by the training videos' statistics, which is what the batch norm without scale and shift does
in front of MAE's linear probe (arXiv 2111.06377, appendix A.1). L-BFGS finds the weights, and the strength of the L2
penalty is the best of a grid on a held-out part of the training videos, as in CLIP (arXiv 2103.00020, appendix A.3);
the final fit is on all of them. Test videos have no part in any choice.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from pretrain.features import VideoFeatures

PENALTIES = tuple(10.0**power for power in range(-5, 2))  # on half the squared weights, beside the mean loss
HELD_OUT_SHARE = 0.2
ITERATIONS = 1000
LEAST_LOG = -50.0
"""Logarithm of the probability of a class that no training video has."""


def linear_logits(
    train: VideoFeatures, test: VideoFeatures, classes: int, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """Fits the probe and asks it.

    Args:
        train: Mean-pooled features `(n, views, D)` of the training videos.
        test: Those of the test videos.
        classes: Number of classes, K.
        seed: Draws the held-out part of the training videos.

    Returns:
        `(m, views, K)` logarithms of probabilities, and the penalty that was chosen.
    """
    kept, held_out = divide(train, seed)
    fit = (part_of(train, kept), part_of(train, held_out))
    losses = [held_out_loss(_ask(fit[0], fit[1], classes, penalty), fit[1].labels) for penalty in PENALTIES]
    penalty = PENALTIES[int(np.argmin(losses))]
    return _ask(train, test, classes, penalty), {"penalty": penalty}


def divide(train: VideoFeatures, seed: int) -> tuple[list[int], list[int]]:
    """Divides training videos in two, class by class.

    Args:
        train: The videos; `labels` are theirs.
        seed: Draws those that are held out.

    Returns:
        The numbers of those to fit on, and of a fifth of each class to choose by: one at least where it has two, none
        where it has one.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    held_out: list[int] = []
    labels = train.labels.numpy()
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(int(HELD_OUT_SHARE * len(members)), 1) if len(members) > 1 else 0
        held_out += members[np.argsort(generator.random(len(members)))[:count]].tolist()
    return sorted(set(range(len(labels))) - set(held_out)), sorted(held_out)


def part_of(videos: VideoFeatures, numbers: list[int]) -> VideoFeatures:
    """Returns the features of some of the videos."""
    return VideoFeatures(
        videos.values[numbers],
        videos.labels[numbers],
        [videos.keys[number] for number in numbers],
        [videos.errors[number] for number in numbers],
    )


def held_out_loss(logits: Tensor, labels: Tensor) -> float:
    """Returns the cross-entropy of videos, whose logits `(n, views, K)` are averaged over their views."""
    return torch.nn.functional.cross_entropy(logits.mean(1), labels).item()


def _ask(train: VideoFeatures, asked: VideoFeatures, classes: int, penalty: float) -> Tensor:
    from sklearn.exceptions import ConvergenceWarning  # takes a second
    from sklearn.linear_model import LogisticRegression

    values, labels = (part.numpy() for part in train.by_view())
    mean, deviation = values.mean(0), values.std(0) + 1e-6
    found = LogisticRegression(C=1 / (penalty * len(values)), max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # weak penalties may need more; they are judged as they are
        found.fit(((values - mean) / deviation).astype(np.float64), labels)
    views = asked.values.shape[1]
    voices = ((asked.values.flatten(0, 1).numpy() - mean) / deviation).astype(np.float64)
    logits = torch.full((len(voices), classes), LEAST_LOG)
    with np.errstate(divide="ignore"):
        shares = torch.from_numpy(found.predict_log_proba(voices)).float().clamp_min(LEAST_LOG)
    logits[:, torch.from_numpy(found.classes_)] = shares
    return logits.unflatten(0, (-1, views))
