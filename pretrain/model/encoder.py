"""ViViT encoders (arXiv 2103.15691) that run on all tokens, or on visible tokens only as in MAE (arXiv 2111.06377).

    joint                model 1: every token attends to every token
    factorised_encoder   model 2: a spatial transformer inside each slot, then a temporal one over the slots' means

An encoder returns tokens for a decoder to read and, for a classifier, its class token or the means to pool.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.errors import Refused
from pretrain.model.blocks import LAYER_NORM_EPS, drop_path_rates, initialise, stack
from pretrain.model.positions import TEMPERATURE, PositionEmbedding
from pretrain.model.residual_attention import SMALLEST_STEM_SIDE, ConvolutionalTubeletEmbedding
from pretrain.model.tubelets import Grid, TubeletEmbedding, grid_of

EncoderName = Literal["joint", "factorised_encoder"]

# Width, depth, heads: ViT (arXiv 2010.11929, table 1), Ti and S from DeiT (arXiv 2012.12877), as VideoMAE uses them.
VARIANTS = {
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}

STEMS = {"linear": TubeletEmbedding, "residual_attention": ConvolutionalTubeletEmbedding}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The architecture of an encoder."""

    name: EncoderName = "joint"
    """How tokens attend to each other over space and time."""
    variant: Literal["Ti", "S", "B", "L", "H"] = "B"
    """Published size, which sets width, depth and heads."""
    width: int | None = None
    """Width of a token in place of the variant's."""
    depth: int | None = None
    """Number of blocks in place of the variant's (of the spatial transformer, where there are two)."""
    heads: int | None = None
    """Number of heads in place of the variant's."""
    temporal_depth: int = 4
    """Blocks of the factorised encoder's temporal transformer."""
    mlp_ratio: float = 4.0
    """Width of an MLP's hidden layer over the width of a token."""
    tubelet: tuple[int, int, int] = (2, 16, 16)
    """Frames, height and width of a tubelet."""
    stem: Literal["linear", "residual_attention"] = "linear"
    """How a tubelet becomes a token: by a linear projection, or by a small convolutional network with attention."""
    positions: Literal["sincos", "sincos_separable", "learned"] = "sincos"
    """Position embedding."""
    position_temperature: float = TEMPERATURE
    """Greatest wavelength of sine-cosine positions over the smallest; on grids of few tokens small models learn faster
    with a small one."""
    drop_path: float = 0.0
    """Probability that a clip skips the last block's branches in training; rises linearly from the first block."""

    def sizes(self) -> tuple[int, int, int]:
        """Returns width, depth and heads: the ones given, else the variant's."""
        width, depth, heads = VARIANTS[self.variant]
        return (
            width if self.width is None else self.width,
            depth if self.depth is None else self.depth,
            heads if self.heads is None else self.heads,
        )

    def resolved(self) -> "EncoderConfig":
        """Returns the same architecture with width, depth and heads spelt out."""
        width, depth, heads = self.sizes()
        return dataclasses.replace(self, width=width, depth=depth, heads=heads)

    def validate(self, frames: int, size: int, field: str = "encoder") -> None:
        """Checks the architecture for clips of `frames` frames and `size` pixels on each side.

        Args:
            frames: Frames of a clip.
            size: Height and width of a clip in pixels.
            field: The name that this group of fields has in the run's configuration.

        Raises:
            Refused: A size cannot be, or does not divide.
        """
        width, depth, heads = self.sizes()
        refuse_below_one(
            field, width=width, depth=depth, heads=heads, temporal_depth=self.temporal_depth, mlp_ratio=self.mlp_ratio
        )
        t, h, w = self.tubelet
        if min(t, h, w) < 1:
            raise Refused(f"{field}.tubelet: {t} x {h} x {w} must be at least 1 x 1 x 1")
        if frames % t:
            raise Refused(f"data.clip.frames: {frames} frames do not divide into tubelets of {t}; change one of them")
        if size % h or size % w:
            raise Refused(f"data.clip.size: {size} pixels do not divide into tubelets of {h} x {w}; change one of them")
        if self.stem == "residual_attention" and min(h, w) < SMALLEST_STEM_SIDE:
            raise Refused(
                f"{field}.stem: residual_attention halves a tubelet's height and width three times, and "
                f"{field}.tubelet is {t} x {h} x {w}; give sides of at least {SMALLEST_STEM_SIDE}, or the linear stem"
            )
        if width % heads:
            raise Refused(f"{field}.heads: {heads} heads do not divide {field}.width {width}; change one")
        if width % 2:
            raise Refused(f"{field}.width: {width} must be even")
        if not 1 < self.position_temperature < math.inf:
            raise Refused(f"{field}.position_temperature: {self.position_temperature} must be greater than 1")
        if self.positions == "learned" and self.position_temperature != TEMPERATURE:
            raise Refused(f"{field}.position_temperature: learned positions have none; leave it out")
        if not 0 <= self.drop_path < 1:
            raise Refused(f"{field}.drop_path: {self.drop_path} must be at least 0 and less than 1")


def refuse_below_one(group: str, **sizes: float) -> None:
    """Raises `Refused` for the first of a group's fields that is not a finite number of at least 1."""
    for name, value in sizes.items():
        if not 1 <= value < math.inf:
            raise Refused(f"{group}.{name}: {value} must be at least 1")


class Encoded(NamedTuple):
    """What an encoder returns.

    Attributes:
        tokens: `(B, Nv, D)`, one for each tubelet that went in, normalised.
        temporal: `(B, S, D)`, one for each visible slot, from a factorised encoder; else None.
        slots: `(B, S)`, their slot numbers; else None.
        class_token: `(B, D)`, or None where the encoder has none.
    """

    tokens: Tensor
    temporal: Tensor | None = None
    slots: Tensor | None = None
    class_token: Tensor | None = None

    def last(self) -> Tensor:
        """Returns what the last transformer returned: the temporal tokens, or all tokens where there are none."""
        return self.tokens if self.temporal is None else self.temporal

    def mean(self) -> Tensor:
        """Returns `(B, D)`, the mean over the temporal tokens, or over all tokens where there are none."""
        return self.last().mean(1)


class Encoder(nn.Module):
    """What all encoders share: embedding, positions and the first stack of blocks.

    Args:
        config: The architecture.
        frames: Frames of a clip, T.
        size: Height and width of a clip in pixels.
        mean: Mean of each colour channel.
        std: Standard deviation of each colour channel.
        class_token: Add a learned class token.
    """

    def __init__(
        self,
        config: EncoderConfig,
        frames: int,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        class_token: bool = False,
    ) -> None:
        """Creates and initialises the weights."""
        super().__init__()
        width, depth, heads = config.sizes()
        self.config = config.resolved()
        self.width = width
        self.grid: Grid = grid_of(frames, size, config.tubelet)
        self.embedding = STEMS[config.stem](config.tubelet, width, mean, std)
        self.positions = PositionEmbedding(config.positions, self.grid, width, config.position_temperature)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        rates = drop_path_rates(depth + self._temporal_depth(config), config.drop_path)
        self.blocks = stack(depth, width, heads, config.mlp_ratio, rates[:depth])
        self.norm: nn.Module = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self._build_rest(config, rates[depth:])
        self.apply(initialise)
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)

    def _temporal_depth(self, config: EncoderConfig) -> int:
        return 0

    def _build_rest(self, config: EncoderConfig, rates: list[float]) -> None:
        """Creates what a subclass has beyond the first stack."""

    def embed(self, clips: Tensor, visible: Tensor | None) -> Tensor:
        """Returns embedded tubelets with positions: `(B, Nv, D)`, or `(B, N, D)` if `visible` is None."""
        return self.positions(self.embedding(clips, visible), visible)

    def forward(self, clips: Tensor, visible: Tensor | None = None) -> Encoded:
        """Encodes clips.

        Args:
            clips: `(B, T, H, W, C)`: uint8, or floats that are normalised already.
            visible: `(B, Nv)` ascending token numbers, or None for all tokens.
        """
        raise NotImplementedError

    def leave_out_last_norm(self) -> None:
        """Takes away the layer norm behind the last block, for a head that normalises the mean of the tokens."""
        self.norm = nn.Identity()

    @property
    def layers(self) -> int:
        """Number of blocks that follow each other."""
        return len(self.blocks)

    def layer_of(self, name: str) -> int:
        """Returns a parameter's layer for layer-wise decay: 0 before the blocks, i + 1 in block i, then the rest.

        The class token counts among the rest: it is new in finetuning, like the head.
        """
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return 0 if name.startswith(("embedding.", "positions.")) else self.layers + 1


class JointEncoder(Encoder):
    """Spatio-temporal attention, ViViT's model 1; the class token stands first in the sequence."""

    def forward(self, clips: Tensor, visible: Tensor | None = None) -> Encoded:
        """See `Encoder.forward`."""
        tokens = self.embed(clips, visible)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        if self.class_token is None:
            return Encoded(tokens)
        return Encoded(tokens[:, 1:], class_token=tokens[:, 0])


class FactorisedEncoder(Encoder):
    """ViViT's model 2; a slot is summarised by the mean of its tokens, the class token joins the temporal transformer.

    With `visible` given, all slots that hold visible tokens must hold equally many, in every clip of the batch.
    """

    def _temporal_depth(self, config: EncoderConfig) -> int:
        return config.temporal_depth

    def _build_rest(self, config: EncoderConfig, rates: list[float]) -> None:
        width, _, heads = config.sizes()
        slots = Grid(self.grid.slots, 1, 1)
        self.temporal_positions = PositionEmbedding(config.positions, slots, width, config.position_temperature)
        self.temporal_blocks = stack(config.temporal_depth, width, heads, config.mlp_ratio, rates)
        self.temporal_norm: nn.Module = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, clips: Tensor, visible: Tensor | None = None) -> Encoded:
        """See `Encoder.forward`."""
        tokens = self.embed(clips, visible)
        slots = self._visible_slots(len(clips), visible, tokens.device)
        B, S = slots.shape
        spatial = tokens.reshape(B * S, -1, self.width)
        for block in self.blocks:
            spatial = block(spatial)
        spatial = self.norm(spatial).reshape(B, S, -1, self.width)

        temporal = self.temporal_positions(spatial.mean(2), slots)
        if self.class_token is not None:
            temporal = torch.cat([self.class_token.expand(B, -1, -1), temporal], 1)
        for block in self.temporal_blocks:
            temporal = block(temporal)
        temporal = self.temporal_norm(temporal)
        tokens = spatial.flatten(1, 2)
        if self.class_token is None:
            return Encoded(tokens, temporal, slots)
        return Encoded(tokens, temporal[:, 1:], slots, temporal[:, 0])

    def _visible_slots(self, batch: int, visible: Tensor | None, device: torch.device) -> Tensor:
        if visible is None:
            return torch.arange(self.grid.slots, device=device).expand(batch, -1)
        # Token numbers ascend, so the tokens of a slot stand together and the first of each group names the slot.
        number = visible // self.grid.positions
        slots_seen = int((number[0, 1:] != number[0, :-1]).sum()) + 1
        return number[:, :: number.shape[1] // slots_seen]

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
        if name.startswith(("norm.", "temporal_positions.")):
            return len(self.blocks)
        return super().layer_of(name)


ENCODERS: dict[str, type[Encoder]] = {"joint": JointEncoder, "factorised_encoder": FactorisedEncoder}


def build_encoder(
    config: EncoderConfig,
    frames: int,
    size: int,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
    class_token: bool = False,
) -> Encoder:
    """Returns the encoder that `config.name` asks for; arguments as for `Encoder`."""
    return ENCODERS[config.name](config, frames, size, mean, std, class_token)
