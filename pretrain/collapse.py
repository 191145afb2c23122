"""Whether an encoder's features have collapsed: whether it makes the same of all that it sees.

Two figures are followed. The effective rank is RankMe's (arXiv 2210.02885, equation 1): the exponential of the entropy
of the singular values, which are made to sum to one. The deviation is the one by which SimSiam (arXiv 2011.10566,
section 4.1) and VICReg (arXiv 2105.04906, equation 1) tell a collapse: the standard deviation of each channel over
samples, here of features scaled to length one and times the square root of their width, averaged over channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

RANK_EPS = 1e-7
LEAST_DEVIATION = 2**-8  # of features that differ by less, bf16 stores the same
LEAST_SHARE = 0.02
"""In one run of the demo's recipe, on 320 videos, the loss fell as it should while deviation and rank fell to a tenth
and a fifteenth; in two tiny runs with a weight decay of 60, made to collapse, both fell below a hundredth."""


def effective_rank(features: Tensor) -> float:
    """Returns the effective rank of features `(n, D)`: 1 where all are one vector, at most the lesser of n and D.

    They are not centred: the noise around a vector that all features share would have full rank.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp_min(RANK_EPS) + RANK_EPS
    return (-(shares * shares.log()).sum()).exp().item()


def feature_deviation(features: Tensor) -> float:
    """Returns the deviation of features `(n, D)`: 0 where all point in one direction, about 1 where they go in all."""
    scaled = functional.normalize(features.double(), dim=1) * features.shape[1] ** 0.5
    return scaled.std(0, correction=0).mean().item()


class Spread(NamedTuple):
    """How far the features of different videos lie apart.

    Attributes:
        rank: Their effective rank.
        deviation: Their deviation.
    """

    rank: float
    deviation: float


def spread_of(features: Tensor) -> Spread:
    """Returns the spread of features `(n, D)`."""
    return Spread(effective_rank(features), feature_deviation(features))


def collapse_of(spread: Spread, before: Spread | None) -> str | None:
    """Returns why features count as collapsed, or None where they do not.

    They do where their deviation is next to nothing, or where it, or by how much their rank exceeds the 1 of a single
    vector, is less than a fiftieth of what it was before training.

    Args:
        spread: Their spread.
        before: That of the same encoder's features before training, where it is known.
    """
    if spread.deviation < LEAST_DEVIATION:
        return f"their deviation {spread.deviation:.2g} is below {LEAST_DEVIATION:.2g}"
    if before is None:
        return None
    for name, now, then, least in (
        ("deviation", spread.deviation, before.deviation, 0),
        ("effective rank", spread.rank, before.rank, 1),
    ):
        if now - least < LEAST_SHARE * (then - least):
            return f"their {name} is {now:.3g}, and was {then:.3g} before training"
    return None
