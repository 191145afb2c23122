"""ViViT's four encoders (arXiv 2103.15691) and X-CLIP's cross-frame encoder (arXiv 2208.02816).

    joint                      model 1: every token attends to every token; with one frame it is the image ViT
    factorised_encoder         model 2: a spatial transformer in each slot, then a temporal one over their means
    factorised_self_attention  model 3: in each block first within the slot, then over time at the position
    factorised_dot_product     model 4: half of the heads within the slot, half over time at the position
    cross_frame                slots attend within themselves and tell each other messages

Every one of them runs on all tokens and on visible tokens only; which masks leave tokens that a design can arrange,
`compatibility.py` tells.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

from pretrain.model.attention import Rotary
from pretrain.model.blocks import (
    Block,
    CrossFrameBlock,
    FactorisedDotProductBlock,
    FactorisedSelfAttentionBlock,
    stack,
)
from pretrain.model.encoder import Encoded, Encoder, EncoderConfig
from pretrain.model.positions import PositionEmbedding, temporal_kind
from pretrain.model.tubelets import Grid, Size


class JointEncoder(Encoder):
    """Spatio-temporal attention, ViViT's model 1; the class token stands first in the sequence."""

    wanted: slice | None = None
    """Which tokens the last block returns, the class token among them; None is all."""

    def leave_out_other_tokens(self) -> None:
        """See `Encoder.leave_out_other_tokens`."""
        self.wanted = slice(0, 1)

    def forward(self, clips: Tensor, visible: Tensor | None = None, visible_slots: int | None = None) -> Encoded:
        """See `Encoder.forward`; any tokens may be visible."""
        tokens = self.embed(clips, visible)
        class_tokens = 0 if self.class_token is None else 1
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], 1)
        tokens = self.encode(tokens, rotary=self.turns(clips, visible, class_tokens))
        if not class_tokens:
            return Encoded(tokens)
        return Encoded(tokens[:, 1:], class_token=tokens[:, 0])

    def encode(self, tokens: Tensor, mask: Tensor | BlockMask | None = None, rotary: Rotary | None = None) -> Tensor:
        """Passes embedded tokens `(B, K, D)`, positions added, through the blocks and the norms around them.

        Args:
            tokens: `(B, K, D)`.
            mask: Which tokens see which, as for `Attention`.
            rotary: How queries and keys are turned.
        """
        alone = mask is None and rotary is None
        return self.norm(self.blocks(self.input_norm(tokens), mask, rotary, wanted=self.wanted if alone else None))


class FactorisedEncoder(Encoder):
    """ViViT's model 2; a slot is summarised by the mean of its tokens, the class token joins the temporal transformer.

    With `visible` given, all slots that hold visible tokens must hold equally many, in every clip of the batch.
    """

    def _temporal_depth(self, config: EncoderConfig) -> int:
        return config.temporal_depth

    def _build_rest(self, config: EncoderConfig, rates: list[float]) -> None:
        slots = Grid(self.grid.slots, 1, 1)
        kind = temporal_kind(config.positions)
        self.temporal_positions = PositionEmbedding(kind, slots, self.width, config.position_temperature)
        self.temporal_blocks = stack(Block, config.block(), config.temporal_depth, rates)
        self.temporal_norm: nn.Module = config.block().norm()

    def forward(self, clips: Tensor, visible: Tensor | None = None, visible_slots: int | None = None) -> Encoded:
        """See `Encoder.forward`."""
        B, S = clips.shape[0], visible_slots or self.grid.slots
        tokens = self.embed(clips, visible)
        coordinates = self.coordinates(clips, visible).unflatten(1, (S, -1))  # (B, S, n, 3)
        spatial = self.input_norm(tokens.reshape(B * S, -1, self.width))
        turns = None if self.rotary is None else self.rotary(coordinates.flatten(0, 1))
        spatial = self.norm(self.blocks(spatial, None, turns))

        slots = coordinates[:, :, 0, 0]
        temporal = self.temporal_positions(spatial.mean(1).view(B, S, -1), slots)
        class_tokens = 0 if self.class_token is None else 1
        if self.class_token is not None:
            temporal = torch.cat([self.class_token.expand(B, -1, -1), temporal], 1)
        turns = None if self.rotary is None else self.rotary(functional.pad(slots.unsqueeze(2), (0, 2)), class_tokens)
        temporal = self.temporal_norm(self.temporal_blocks(temporal, None, turns))
        tokens = spatial.view(B, -1, self.width)
        if not class_tokens:
            return Encoded(tokens, temporal, slots)
        return Encoded(tokens, temporal[:, 1:], slots, temporal[:, 0])

    def leave_out_last_norm(self) -> None:
        """See `Encoder.leave_out_last_norm`."""
        self.temporal_norm = nn.Identity()

    @property
    def layers(self) -> int:
        """See `Encoder.layers`; the temporal blocks follow the spatial ones."""
        return len(self.blocks) + len(self.temporal_blocks)

    def layer_of(self, name: str) -> int:
        """See `Encoder.layer_of`."""
        if name.startswith("temporal_blocks."):
            return len(self.blocks) + int(name.split(".")[1]) + 1
        pretrained = name == "class_token" and self.has_class_tokens
        if pretrained or name.startswith(("norm.", "temporal_positions.")):
            return len(self.blocks)
        return super().layer_of(name)


class AxialEncoder(Encoder):
    """What models 3 and 4 share: tokens that attend within their slot and over time at their position.

    With `visible` given, the visible tokens must stand at the same positions in every slot that holds any. The class
    token stands outside the grid: it looks at every token, and every group of tokens has it as one more key.
    """

    def forward(self, clips: Tensor, visible: Tensor | None = None, visible_slots: int | None = None) -> Encoded:
        """See `Encoder.forward`."""
        tokens = self.embed(clips, visible)
        class_tokens = 0 if self.class_token is None else 1
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], 1)
        rotary = self.turns(clips, visible, class_tokens)
        slots = visible_slots or self.grid.slots
        tokens = self.norm(self.blocks(self.input_norm(tokens), slots, class_tokens, rotary))
        if not class_tokens:
            return Encoded(tokens)
        return Encoded(tokens[:, 1:], class_token=tokens[:, 0])


class FactorisedSelfAttentionEncoder(AxialEncoder):
    """ViViT's model 3."""

    block = FactorisedSelfAttentionBlock


class FactorisedDotProductEncoder(AxialEncoder):
    """ViViT's model 4, with the parameters of model 1."""

    block = FactorisedDotProductBlock


class CrossFrameEncoder(Encoder):
    """X-CLIP's encoder: each slot has a class token, from pretraining on; their mean is what a head reads.

    With `visible` given, all slots that hold visible tokens must hold equally many, in every clip of the batch.
    """

    block = CrossFrameBlock
    has_class_tokens = True

    def forward(self, clips: Tensor, visible: Tensor | None = None, visible_slots: int | None = None) -> Encoded:
        """See `Encoder.forward`."""
        assert self.class_token is not None, "the design has class tokens"
        B, S = clips.shape[0], visible_slots or self.grid.slots
        tokens = self.embed(clips, visible).reshape(B, S, -1, self.width)
        tokens = torch.cat([self.class_token.unsqueeze(0).expand(B, S, -1, -1), tokens], 2)  # (B, S, 1 + n, D)
        turns = None
        if self.rotary is not None:
            turns = self.rotary(self.coordinates(clips, visible).reshape(B * S, -1, 3), before=1, after=1)
        tokens = self.norm(self.blocks(self.input_norm(tokens), turns))
        return Encoded(tokens[:, :, 1:].flatten(1, 2), class_token=tokens[:, :, 0].mean(1))


ENCODERS: dict[str, type[Encoder]] = {
    "joint": JointEncoder,
    "factorised_encoder": FactorisedEncoder,
    "factorised_self_attention": FactorisedSelfAttentionEncoder,
    "factorised_dot_product": FactorisedDotProductEncoder,
    "cross_frame": CrossFrameEncoder,
}


def build_encoder(
    config: EncoderConfig,
    frames: int,
    size: Size,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
    class_token: bool = False,
) -> Encoder:
    """Returns the encoder that `config.name` asks for; arguments as for `Encoder`."""
    return ENCODERS[config.name](config, frames, size, mean, std, class_token)
