"""The attentive probe of V-JEPA (arXiv 2404.08471, section 4.1): what a learned query finds in frozen tokens.

One cross-attention block with one learned query and an MLP, timm's, then a linear layer, trained with AdamW under a
cosine schedule, on the tokens as they are: there is no augmentation. The learning rate is the best of a few on a
held-out part of the training videos; the final fit is on all of them.
"""

import itertools

import numpy as np
import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.nn import functional

from finetune.linear_probe import divide, held_out_loss, part_of
from pretrain.features import VideoFeatures
from pretrain.model.blocks import initialise

RATES = (3e-4, 1e-3, 3e-3)
WEIGHT_DECAY = 0.01
BATCH = 64
EPOCHS = 20
LEAST_STEPS = 200


class AttentiveProbe(nn.Module):
    """A learned query over tokens, an MLP and a linear layer.

    Args:
        width: Width of a token.
        heads: Number of heads.
        classes: Number of classes.
    """

    def __init__(self, width: int, heads: int, classes: int) -> None:
        """Creates the weights."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.pool = AttentionPoolLatent(width, num_heads=heads, mlp_ratio=4, norm_layer=nn.LayerNorm)
        self.head = nn.Linear(width, classes)
        self.apply(initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits `(B, classes)` for tokens `(B, N, D)`."""
        return self.head(self.pool(self.norm(tokens)))


def attentive_logits(
    train: VideoFeatures, test: VideoFeatures, classes: int, heads: int, seed: int, device: torch.device
) -> tuple[Tensor, dict[str, float]]:
    """Trains the probe and asks it.

    Args:
        train: Tokens `(n, views, N, D)` of the training videos.
        test: Those of the test videos.
        classes: Number of classes, K.
        heads: Number of heads.
        seed: Draws the held-out part of the training videos, the first weights and the batches.
        device: Where it is trained.

    Returns:
        `(m, views, K)` logits, and the learning rate that was chosen.
    """
    kept, held_out = (part_of(train, numbers) for numbers in divide(train, seed))
    losses = []
    for rate in RATES:
        logits = _ask(_trained(kept, classes, heads, rate, seed, device), held_out, device)
        losses.append(held_out_loss(logits, held_out.labels))
    rate = RATES[int(np.argmin(losses))]
    return _ask(_trained(train, classes, heads, rate, seed, device), test, device), {"learning_rate": rate}


def _trained(
    train: VideoFeatures, classes: int, heads: int, rate: float, seed: int, device: torch.device
) -> AttentiveProbe:
    tokens, labels = train.by_view()
    torch.manual_seed(seed)
    probe = AttentiveProbe(tokens.shape[-1], heads, classes).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    steps = max(EPOCHS * -(-len(tokens) // BATCH), LEAST_STEPS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(len(tokens), generator=generator).split(BATCH) for _ in itertools.count())
    for chosen in itertools.islice(itertools.chain.from_iterable(epochs), steps):
        logits = probe(tokens[chosen].to(device).float())
        functional.cross_entropy(logits, labels[chosen].to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return probe.eval()


@torch.no_grad()
def _ask(probe: AttentiveProbe, asked: VideoFeatures, device: torch.device) -> Tensor:
    logits = [probe(part.to(device).float()).cpu() for part in asked.values.flatten(0, 1).split(BATCH)]
    return torch.cat(logits).unflatten(0, (-1, asked.values.shape[1]))
