"""The k-nearest-neighbour probe: how well videos of one class lie together in the space of an encoder's features.

The weighted vote is that of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination"
(arXiv 1805.01978), as DINO uses it (arXiv 2104.14294). Nothing is trained.
"""

import torch
from torch import Tensor
from torch.nn import functional

NEIGHBOURS = 20
TEMPERATURE = 0.07
ASKED_AT_ONCE = 1024


def knn_shares(
    known: Tensor,
    known_labels: Tensor,
    asked: Tensor,
    classes: int,
    neighbours: int = NEIGHBOURS,
    leave_out_own: bool = False,
) -> Tensor:
    """Returns `(m, classes)`, the share of the neighbours' votes that each class gets.

    Features are centred and scaled by the known ones' statistics and compared by cosine.

    Args:
        known: `(n, D)` features with labels `(n,)`.
        known_labels: Class numbers.
        asked: `(m, D)` features.
        classes: Number of classes.
        neighbours: Neighbours that vote, each with weight exp(cosine / 0.07).
        leave_out_own: Whether `asked` are the known ones, of which each asks the others.
    """
    mean, deviation = known.mean(0), known.std(0) + 1e-6
    known, asked = (functional.normalize((part - mean) / deviation, dim=1) for part in (known, asked))
    voters = min(neighbours, len(known) - leave_out_own)
    shares = []
    for first, part in zip(range(0, len(asked), ASKED_AT_ONCE), asked.split(ASKED_AT_ONCE), strict=True):
        similarity = part @ known.T
        if leave_out_own:
            similarity[:, first : first + len(part)].fill_diagonal_(-torch.inf)
        cosine, nearest = similarity.topk(voters, dim=1)
        weights = (cosine / TEMPERATURE).softmax(1)
        shares.append(torch.zeros(len(part), classes).scatter_add_(1, known_labels[nearest], weights))
    return torch.cat(shares)


def knn_accuracy(
    known: Tensor,
    known_labels: Tensor,
    asked: Tensor,
    asked_labels: Tensor,
    neighbours: int = NEIGHBOURS,
    leave_out_own: bool = False,
) -> float:
    """Returns the share of `asked` features whose neighbours among `known` ones vote for the right class.

    Args:
        known: `(n, D)` features with labels `(n,)`.
        known_labels: Class numbers.
        asked: `(m, D)` features with labels `(m,)`.
        asked_labels: Class numbers.
        neighbours: Neighbours that vote.
        leave_out_own: Whether `asked` are the known ones, of which each asks the others.
    """
    classes = int(known_labels.max()) + 1
    shares = knn_shares(known, known_labels, asked, classes, neighbours, leave_out_own)
    return (shares.argmax(1) == asked_labels).float().mean().item()
