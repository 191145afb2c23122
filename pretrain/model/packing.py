"""Clips of any size in sequences of fixed length (NaViT, Dehghani et al., 2023, arXiv 2307.06304).

A sequence holds the tokens of several clips, its segments, one behind the other; attention and pooling stay within a
segment, and a token's position is its slot, row and column in its own clip. So each clip is computed as if it were
alone. Places without a token have segment -1: they see each other only, and no loss reads them.

Parameters are those of the parts that are used, under the same names, so weights go from packed to unpacked models and
back.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.errors import Refused
from pretrain.model.attention import block_diagonal
from pretrain.model.encoder import Encoded, Encoder, EncoderConfig
from pretrain.model.encoders import JointEncoder
from pretrain.model.mae import MaskedAutoencoder
from pretrain.model.masking import MaskConfig, draw_mask, mask_counts
from pretrain.model.positions import WITH_COORDINATES
from pretrain.model.tubelets import Grid


class PackedTokens(NamedTuple):
    """Tubelets of several clips in each of B sequences with K places.

    Attributes:
        tubelets: `(B, K, P)` uint8, or floats that are normalised already.
        coordinates: `(B, K, 3)` slot, row and column of each in its clip.
        segments: `(B, K)` number of its clip in the sequence, from 0; -1 in places that hold no token.
    """

    tubelets: Tensor
    coordinates: Tensor
    segments: Tensor


class PackedReconstruction(NamedTuple):
    """What the masked autoencoder returns of packed clips.

    Attributes:
        loss: `(B, M)` mean squared error of each decoded tubelet; 0 in places that hold none.
        prediction: `(B, M, P)`, predicted targets.
    """

    loss: Tensor
    prediction: Tensor


class PackedMaskedAutoencoder(MaskedAutoencoder):
    """A masked autoencoder of packed clips; its parameters are those of `MaskedAutoencoder`."""

    def forward(  # type: ignore[override]
        self, visible: PackedTokens, decoded: PackedTokens | None = None
    ) -> PackedReconstruction | Encoded:
        """Reconstructs masked tubelets from the visible ones of their own clips, or encodes clips.

        Args:
            visible: What the encoder sees, K = L places; every clip has a token here.
            decoded: What the decoder reconstructs, K = M places; None for what the encoder makes of what it sees.
        """
        encoded = encode_packed(self.encoder, visible)
        if decoded is None:
            return Encoded(encoded)
        context = self.decoder_embedding(encoded) + self.decoder_positions.at(visible.coordinates)
        mask_tokens = self.mask_token.expand(*decoded.segments.shape, -1)
        asked = mask_tokens + self.decoder_positions.at(decoded.coordinates)
        if self.looks_across:
            # An empty place looks at the first clip: where the context is full, it had nothing to look at.
            mask = block_diagonal(decoded.segments.clamp(min=0), visible.segments)
        else:
            mask = block_diagonal(torch.cat([visible.segments, decoded.segments], 1))
        prediction = self.predict(context, asked, mask)
        channels = len(self.encoder.embedding.mean)
        error = (prediction.float() - self.targets_of(decoded.tubelets, channels)).square().mean(-1)
        return PackedReconstruction(torch.where(decoded.segments >= 0, error, 0.0), prediction)


def encode_packed(encoder: Encoder, tokens: PackedTokens) -> Tensor:
    """Returns tokens `(B, K, D)` of a joint encoder; those of empty places mean nothing."""
    assert isinstance(encoder, JointEncoder), "others are refused by `refuse_unpackable`"
    embedded = encoder.embedding.embed(tokens.tubelets)
    if encoder.rotary is None:
        embedded = embedded + encoder.positions.at(tokens.coordinates)
    rotary = None if encoder.rotary is None else encoder.rotary(tokens.coordinates)
    return encoder.encode(embedded, block_diagonal(tokens.segments), rotary)


def pool_segments(tokens: Tensor, segments: Tensor, clips: int) -> Tensor:
    """Returns the mean over the tokens of each clip.

    Args:
        tokens: `(B, K, D)`.
        segments: `(B, K)` numbers of their clips; -1 in places that hold no token.
        clips: Clips in a sequence, g.

    Returns:
        `(B, g, D)`.
    """
    members = segments.unsqueeze(1) == torch.arange(clips, device=segments.device).unsqueeze(1)  # (B, g, K)
    return members.to(tokens.dtype) @ tokens / members.sum(-1, keepdim=True).clamp(min=1)


def packed_counts(config: MaskConfig, kept: int) -> tuple[int, int]:
    """Returns how many of a clip's kept tokens are visible and how many are reconstructed."""
    visible, decoded, *_ = mask_counts(config, Grid(1, 1, kept))
    return visible, decoded


def draw_packed_mask(config: MaskConfig, kept: int, mask_key: int, decoder_key: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws the mask of a clip's kept tokens; see `draw_mask`."""
    return draw_mask(config, Grid(1, 1, kept), mask_key, decoder_key)


def decoded_places(config: MaskConfig, tokens: int) -> int:
    """Returns the most tokens that are reconstructed where `tokens` are visible, whatever clips they come from."""
    return math.ceil(tokens * config.decoded * config.ratio / (1 - config.ratio))


def refuse_unpackable(config: EncoderConfig, field: str, mask: MaskConfig | None = None) -> None:
    """Refuses what cannot be computed on packed clips.

    Args:
        config: The encoder.
        field: The name that its fields have in the run's configuration.
        mask: The mask of pretraining; None where there is none.

    Raises:
        Refused: The encoder needs slots of equal size, its positions know no rows and columns, or the mask does.
    """
    if config.name != "joint":
        raise Refused(f"{field}.name: {config.name} cannot take the clips of data.packing; use joint")
    if config.positions not in WITH_COORDINATES:
        raise Refused(
            f"{field}.positions: {config.positions} is for one token grid, but data.packing gives each clip its own; "
            f"use {' or '.join(WITH_COORDINATES)}"
        )
    if mask is not None and mask.name != "random":
        raise Refused(f"mask.name: {mask.name} is for clips of one size, not for those of data.packing; use random")
    if mask is not None and mask.decoded_pattern != "random":
        raise Refused(
            f"mask.decoded_pattern: {mask.decoded_pattern} is for clips of one size, not for those of data.packing; "
            f"use random"
        )
