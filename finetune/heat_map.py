"""Where a classifier looked in a clip: attention rollout (arXiv 2005.00928) from what its head reads down to tubelets.

The row that rolls out is what the head reads: the class token's, the mean of all rows, or for attention pooling the
weights of its query, the mean over its heads. `pretrain/model/rollout.py` tells what becomes of it in each encoder; a
stem with residual attention looks within a tubelet and has no part in it. The watched forward pass is one of its own,
so that predictions are the same with and without it.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune.classifier import AttentionPool, Classifier
from pretrain.model.encoder import Encoded, Encoder
from pretrain.model.packing import PackedTokens, encode_packed
from pretrain.model.rollout import rollout, watching_attention


class HeatMap(NamedTuple):
    """Where a model looked in a clip.

    Attributes:
        clip: `(T, H, W, 3)` uint8, the frames that the model saw.
        heat: `(slots, rows, columns)`, how much of each tubelet stands in what the head reads; what is missing to a sum
            of 1 is the class tokens' own.
    """

    clip: np.ndarray
    heat: np.ndarray


@torch.no_grad()
def heat_map(model: Classifier, view: Tensor | PackedTokens) -> HeatMap:
    """Tells where a model looks in one view of a video.

    Args:
        model: The classifier, in evaluation mode.
        view: `(1, T, H, W, 3)` uint8, or the sequence of one packed clip, on any device.
    """
    device = next(model.parameters()).device
    if isinstance(view, PackedTokens):
        return _packed_heat_map(model.encoder, PackedTokens(*(part.to(device) for part in view)))
    with watching_attention(model.encoder) as calls:
        encoded = model.encoder(view.to(device))
    shares = rollout(model.encoder, calls, _read_by_head(model, encoded))
    heat = shares.tokens[0].view(model.encoder.grid)
    return HeatMap(view[0].cpu().numpy(), heat.cpu().numpy())


def _read_by_head(model: Classifier, encoded: Encoded) -> Tensor | None:
    """Returns how much the head reads of each token of `encoded.last()`; None where it reads the class token."""
    if isinstance(model.pool, AttentionPool):
        return model.pool.weights(encoded)
    if model.pool is Encoded.mean:
        tokens = encoded.last()
        return tokens.new_full(tokens.shape[:2], 1 / tokens.shape[1])
    return None


def _packed_heat_map(encoder: Encoder, tokens: PackedTokens) -> HeatMap:
    """Reads a sequence of one clip, whose tubelets are all there, in their order and in the first places."""
    with watching_attention(encoder) as calls:
        encode_packed(encoder, tokens)
    members = (tokens.segments == 0).float()
    kept = int(members.sum())
    heat = rollout(encoder, calls, members / kept).tokens[0, :kept]
    grid = [int(length) + 1 for length in tokens.coordinates[0, :kept].amax(0)]
    (slots, rows, columns), (t, h, w) = grid, encoder.config.tubelet
    tubelets = tokens.tubelets[0, :kept].view(slots, rows, columns, t, h, w, -1)
    clip = tubelets.permute(0, 3, 1, 4, 2, 5, 6).reshape(slots * t, rows * h, columns * w, -1)
    return HeatMap(clip.cpu().numpy(), heat.view(grid).cpu().numpy())
