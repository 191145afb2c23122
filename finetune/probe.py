"""A k-nearest-neighbour probe: what an encoder's features are worth, without any training on top.

The weighted vote is that of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination"
(arXiv 1805.01978), as DINO uses it (arXiv 2104.14294).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.data.clips import ClipConfig
from pretrain.data.order import evaluation_slice
from pretrain.data.shards import ShardSet
from pretrain.data.views import EvaluationViews, evaluation_batches
from pretrain.errors import Refused, StoppedByRule
from pretrain.stage import refuse_stride_on_resampled

NEIGHBOURS = 20
TEMPERATURE = 0.07


@torch.no_grad()
def features(
    encoder: nn.Module, shards: ShardSet, clip: ClipConfig, micro_batch: int = 16, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Computes the features of every video of a set, from its middle clip.

    Args:
        encoder: The encoder; put into evaluation mode.
        shards: The videos.
        clip: The clips that the encoder sees.
        micro_batch: Videos that go through the encoder at once.
        workers: Loader processes.

    Returns:
        `(samples, D)` mean tokens and `(samples,)` labels, -1 where a video has none.

    Raises:
        Refused: A video cannot be decoded, or the clip's stride means nothing on this set.
        StoppedByRule: The encoder returns features that are not finite.
    """
    refuse_stride_on_resampled("shards", shards, clip)
    encoder.eval()
    device = next(encoder.parameters()).device
    numbers, counted = evaluation_slice(shards.samples, world=1, rank=0)
    pooled, labels = [], []
    for group in evaluation_batches(EvaluationViews(shards, clip), numbers, counted, micro_batch, workers):
        broken = next((one for one in group if one.error), None)
        if broken:
            raise Refused(f"{shards.folder}: {broken.key} cannot be decoded ({broken.error}); pack the videos anew")
        pooled.append(encoder(torch.cat([one.clips for one in group]).to(device)).mean().float().cpu())
        labels += [one.label for one in group]
    found = torch.cat(pooled)
    if not found.isfinite().all():
        raise StoppedByRule(f"{shards.folder}: the encoder's features are not finite; pretrain again")
    return found, torch.tensor(labels)


def knn_accuracy(
    known: Tensor,
    known_labels: Tensor,
    asked: Tensor,
    asked_labels: Tensor,
    neighbours: int = NEIGHBOURS,
) -> float:
    """Returns the share of `asked` features whose neighbours among `known` ones vote for the right class.

    Features are centred and scaled by the known ones' statistics and compared by cosine.

    Args:
        known: `(n, D)` features with labels `(n,)`.
        known_labels: Class numbers.
        asked: `(m, D)` features with labels `(m,)`.
        asked_labels: Class numbers.
        neighbours: Neighbours that vote, each with weight exp(cosine / 0.07).
    """
    mean, deviation = known.mean(0), known.std(0) + 1e-6
    known, asked = (functional.normalize((part - mean) / deviation, dim=1) for part in (known, asked))
    similarity, nearest = (asked @ known.T).topk(min(neighbours, len(known)), dim=1)
    votes = torch.zeros(len(asked), int(known_labels.max()) + 1)
    votes.scatter_add_(1, known_labels[nearest], (similarity / TEMPERATURE).exp())
    return (votes.argmax(1) == asked_labels).float().mean().item()
