"""The masked autoencoder for clips (arXiv 2111.06377; video: arXiv 2203.12602, arXiv 2205.09113).

The encoder sees the visible tubelets. A light decoder reads its output and one mask token for each tubelet that is to
be reconstructed, all with positions, and predicts pixels. The loss is the mean squared error on these tubelets, with
targets normalised in each tubelet and colour channel as in VideoMAE.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.errors import Refused
from pretrain.model.blocks import LAYER_NORM_EPS, initialise, stack
from pretrain.model.encoder import Encoded, Encoder, refuse_below_one
from pretrain.model.positions import PositionEmbedding
from pretrain.model.tubelets import Grid, cut_tubelets, take_tokens


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The decoder, which is thrown away after pretraining."""

    width: int = 384
    """Width of a token."""
    depth: int = 4
    """Number of blocks."""
    heads: int = 6
    """Number of heads."""
    mlp_ratio: float = 4.0
    """Width of an MLP's hidden layer over the width of a token."""
    normalise_targets: bool = True
    """Reconstruct pixels normalised in each tubelet and channel instead of plain ones."""

    def validate(self) -> None:
        """Raises `Refused` for sizes that cannot be or that do not divide."""
        refuse_below_one("decoder", width=self.width, depth=self.depth, heads=self.heads, mlp_ratio=self.mlp_ratio)
        if self.width % self.heads or self.width % 2:
            raise Refused(
                f"decoder.width: {self.width} must be even and a multiple of decoder.heads {self.heads}; change one"
            )


class Reconstruction(NamedTuple):
    """What the masked autoencoder returns.

    Attributes:
        loss: `(B,)`, mean squared error of each clip over its masked tubelets.
        prediction: `(B, Nm, P)`, predicted targets.
    """

    loss: Tensor
    prediction: Tensor


class MaskedAutoencoder(nn.Module):
    """An encoder with a decoder that makes it learn.

    Args:
        encoder: The encoder to train.
        config: The decoder.
    """

    def __init__(self, encoder: Encoder, config: DecoderConfig) -> None:
        """Creates the decoder; the encoder keeps its weights."""
        super().__init__()
        self.encoder = encoder
        self.config = config
        tubelet_values = math.prod(encoder.config.tubelet) * len(encoder.embedding.mean)
        self.decoder_embedding = nn.Linear(encoder.width, config.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        # The decoder's positions are fixed; a learned embedding is the encoder's own affair.
        positions = "sincos" if encoder.config.positions == "learned" else encoder.config.positions
        temperature = encoder.config.position_temperature
        slots = Grid(encoder.grid.slots, 1, 1)
        self.decoder_positions = PositionEmbedding(positions, encoder.grid, config.width, temperature)
        self.slot_positions = PositionEmbedding(positions, slots, config.width, temperature)
        self.decoder_blocks = stack(config.depth, config.width, config.heads, config.mlp_ratio, [0.0] * config.depth)
        self.decoder_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.decoder_head = nn.Linear(config.width, tubelet_values)
        for part in (self.decoder_embedding, self.decoder_blocks, self.decoder_head):
            part.apply(initialise)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, clips: Tensor, visible: Tensor, masked: Tensor) -> Reconstruction:
        """Reconstructs masked tubelets from visible ones.

        Args:
            clips: `(B, T, H, W, C)` uint8.
            visible: `(B, Nv)` ascending numbers of the tokens that the encoder sees.
            masked: `(B, Nm)` ascending numbers of the tokens to reconstruct.
        """
        prediction = self.decode(self.encoder(clips, visible), visible, masked)
        error = (prediction.float() - self.targets(clips, masked)).square()
        return Reconstruction(error.mean((1, 2)), prediction)

    def decode(self, encoded: Encoded, visible: Tensor, masked: Tensor) -> Tensor:
        """Predicts the targets of masked tubelets.

        Args:
            encoded: What the encoder returned for the visible tokens.
            visible: `(B, Nv)` their numbers.
            masked: `(B, Nm)` numbers of the tokens to reconstruct.

        Returns:
            `(B, Nm, P)`.
        """
        tokens = [self.decoder_positions(self.decoder_embedding(encoded.tokens), visible)]
        if encoded.temporal is not None:
            tokens.append(self.slot_positions(self.decoder_embedding(encoded.temporal), encoded.slots))
        tokens.append(self.decoder_positions(self.mask_token.expand(*masked.shape, -1), masked))
        sequence = torch.cat(tokens, 1)
        for block in self.decoder_blocks:
            sequence = block(sequence)
        return self.decoder_head(self.decoder_norm(sequence[:, -masked.shape[1] :]))

    def targets(self, clips: Tensor, masked: Tensor) -> Tensor:
        """Returns `(B, Nm, P)`, the values that the decoder should predict."""
        tubelets = take_tokens(cut_tubelets(clips, self.encoder.config.tubelet), masked)
        pixels = tubelets.float().unflatten(-1, (-1, clips.shape[-1])) / 255  # (B, Nm, t * h * w, C)
        if self.config.normalise_targets:
            mean, deviation = pixels.mean(-2, keepdim=True), pixels.std(-2, keepdim=True)
            pixels = (pixels - mean) / (deviation + 1e-6)
        return pixels.flatten(-2)
