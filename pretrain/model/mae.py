"""The masked autoencoder for clips (arXiv 2111.06377; video: arXiv 2203.12602, arXiv 2205.09113).

The encoder sees the visible tubelets. A light decoder reads its output and one mask token for each tubelet that is to
be reconstructed, all with positions, and predicts pixels. The loss is the mean squared error on these tubelets. The
decoder attends jointly over all it is given (VideoMAE), or its mask tokens look into the encoder's output alone
(CrossMAE, arXiv 2401.14391), so that a part of the masked tokens costs no more than that part.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

from pretrain.errors import Refused
from pretrain.model.blocks import LAYER_NORM_EPS, Block, BlockConfig, CrossBlock, initialise, stack
from pretrain.model.encoder import Encoded, Encoder, refuse_below_one
from pretrain.model.positions import PositionEmbedding, fixed_kind
from pretrain.model.tubelets import Grid, take_tubelets

TargetName = Literal["normalised", "normalised_whole", "pixels"]

TARGET_EPS = 1e-6


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
    attention: Literal["joint", "cross"] = "joint"
    """joint: all tokens attend to all (VideoMAE); cross: mask tokens look into the encoded ones alone (CrossMAE)."""
    targets: TargetName = "normalised"
    """Pixels normalised in each tubelet and colour channel (VideoMAE), in each tubelet as a whole (mae_st, MAE), or
    plain."""

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
        visible_slots: Number of slots that hold visible tokens; None for all.
    """

    def __init__(self, encoder: Encoder, config: DecoderConfig, visible_slots: int | None = None) -> None:
        """Creates the decoder; the encoder keeps its weights."""
        super().__init__()
        self.encoder = encoder
        self.config = config
        self.visible_slots = visible_slots
        self.decoder_embedding = nn.Linear(encoder.width, config.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        # The decoder's positions are fixed; learned ones are the encoder's own affair.
        kind, temperature = fixed_kind(encoder.config.positions), encoder.config.position_temperature
        slots = Grid(encoder.grid.slots, 1, 1)
        self.decoder_positions = PositionEmbedding(kind, encoder.grid, config.width, temperature)
        self.slot_positions = PositionEmbedding(kind, slots, config.width, temperature)
        self.looks_across = config.attention == "cross"
        block = CrossBlock if self.looks_across else Block
        sizes = BlockConfig(config.width, config.heads, config.mlp_ratio)
        self.decoder_blocks = stack(block, sizes, config.depth)
        self.decoder_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.decoder_head = nn.Linear(config.width, math.prod(encoder.config.tubelet) * len(encoder.embedding.mean))
        for part in (self.decoder_embedding, self.decoder_blocks, self.decoder_head):
            part.apply(initialise)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self, clips: Tensor, visible: Tensor | None = None, masked: Tensor | None = None
    ) -> Reconstruction | Encoded:
        """Reconstructs masked tubelets from visible ones, or encodes whole clips.

        Args:
            clips: `(B, T, H, W, C)` uint8.
            visible: `(B, Nv)` ascending numbers of the tokens that the encoder sees; None for what it makes of all.
            masked: `(B, Nm)` ascending numbers of the tokens to reconstruct; None where `visible` is.
        """
        if visible is None or masked is None:
            return self.encoder(clips)
        prediction = self.decode(self.encoder(clips, visible, self.visible_slots), visible, masked)
        error = functional.mse_loss(prediction.float(), self.targets(clips, masked), reduction="none")
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
        context = self.decoder_positions(self.decoder_embedding(encoded.tokens), visible)
        if encoded.temporal is not None:
            temporal = self.slot_positions(self.decoder_embedding(encoded.temporal), encoded.slots)
            context = torch.cat([context, temporal], 1)
        return self.predict(context, self.decoder_positions(self.mask_token.expand(*masked.shape, -1), masked))

    def predict(self, context: Tensor, asked: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """Runs the decoder's blocks.

        Args:
            context: `(B, K, decoder.width)` encoded tokens, with positions.
            asked: `(B, Nm, decoder.width)` mask tokens, with positions.
            mask: Which tokens see which, as for `Attention`: `asked` the context if the decoder looks across, else the
                context and `asked` in one sequence each other.

        Returns:
            `(B, Nm, P)`.
        """
        if self.looks_across:
            decoded = self.decoder_blocks(asked, context, mask)
        else:
            wanted = slice(-asked.shape[1], None)
            together = torch.cat([context, asked], 1)
            decoded = self.decoder_blocks(together, mask, wanted=wanted if mask is None else None)[:, wanted]
        return self.decoder_head(self.decoder_norm(decoded))

    def targets(self, clips: Tensor, masked: Tensor) -> Tensor:
        """Returns `(B, Nm, P)`, the values that the decoder should predict."""
        return self.targets_of(take_tubelets(clips, masked, self.encoder.config.tubelet), clips.shape[-1])

    def targets_of(self, tubelets: Tensor, channels: int) -> Tensor:
        """Returns what to predict of uint8 tubelets `(..., P)` with so many colour channels: floats `(..., P)`."""
        levels = tubelets.float()  # 0 to 255, 255 times the pixels of whose deviation the published eps tells
        if self.config.targets == "pixels":
            return levels.div_(255)
        if self.config.targets == "normalised_whole":
            variance, mean = torch.var_mean(levels, -1, keepdim=True)
            return levels.sub_(mean).div_((variance + 255**2 * TARGET_EPS).sqrt())
        levels = levels.unflatten(-1, (-1, channels))  # (..., t * h * w, C)
        deviation, mean = torch.std_mean(levels, -2, keepdim=True)
        return levels.sub_(mean).div_(deviation + 255 * TARGET_EPS).flatten(-2)
