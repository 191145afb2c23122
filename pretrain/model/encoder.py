"""What an encoder is: its configuration, what it returns, and what all encoders share.

The five encoders themselves are in `encoders.py`. An encoder runs on all tokens of a clip, or on visible tokens only as
in MAE (arXiv 2111.06377); it returns tokens for a decoder to read and, for a classifier, its class token or the tokens
to pool.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.errors import Refused
from pretrain.model.attention import BiasName, Rotary
from pretrain.model.blocks import (
    LAYER_NORM_EPS,
    ActivationName,
    Block,
    BlockConfig,
    ResidualBlock,
    drop_path_rates,
    initialise,
    stack,
)
from pretrain.model.positions import TEMPERATURE, WITH_WAVELENGTHS, PositionEmbedding, PositionName, RotaryEmbedding
from pretrain.model.residual_attention import SMALLEST_STEM_SIDE, ConvolutionalTubeletEmbedding
from pretrain.model.tubelets import Grid, Size, TubeletEmbedding, coordinates_of, grid_of

EncoderName = Literal[
    "joint", "factorised_encoder", "factorised_self_attention", "factorised_dot_product", "cross_frame"
]
VariantName = Literal["Ti", "S", "B", "L", "H", "g"]
StemName = Literal["linear", "residual_attention"]

STEMS: dict[StemName, type[TubeletEmbedding]] = {
    "linear": TubeletEmbedding,
    "residual_attention": ConvolutionalTubeletEmbedding,
}


class Variant(NamedTuple):
    """A published size."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0


# ViT (arXiv 2010.11929, table 1), Ti and S from DeiT (arXiv 2012.12877), as VideoMAE uses them; g as in VideoMAE V2
# (arXiv 2303.16727).
VARIANTS: dict[VariantName, Variant] = {
    "Ti": Variant(192, 12, 3),
    "S": Variant(384, 12, 6),
    "B": Variant(768, 12, 12),
    "L": Variant(1024, 24, 16),
    "H": Variant(1280, 32, 16),
    "g": Variant(1408, 40, 16, 48 / 11),
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The architecture of an encoder."""

    name: EncoderName = "joint"
    """How tokens attend to each other over space and time."""
    variant: VariantName = "B"
    """Published size, which sets width, depth, heads and mlp_ratio."""
    width: int | None = None
    """Width of a token in place of the variant's."""
    depth: int | None = None
    """Number of blocks in place of the variant's (of the spatial transformer, where there are two)."""
    heads: int | None = None
    """Number of heads in place of the variant's."""
    temporal_depth: int = 4
    """Blocks of the factorised encoder's temporal transformer."""
    mlp_ratio: float | None = None
    """Width of an MLP's hidden layer over the width of a token, in place of the variant's."""
    tubelet: tuple[int, int, int] = (2, 16, 16)
    """Frames, height and width of a tubelet; one frame is uniform frame sampling."""
    stem: StemName = "linear"
    """How a tubelet becomes a token: by a linear projection, or by a small convolutional network with attention."""
    positions: PositionName = "sincos"
    """Position embedding."""
    position_temperature: float = TEMPERATURE
    """Greatest wavelength of sine-cosine or rotary positions over the smallest; on grids of few tokens small models
    learn faster with a small one."""
    drop_path: float = 0.0
    """Probability that a clip (in the spatial transformer of the factorised encoder: a slot) skips the last block's
    branches in training; rises linearly from the first block."""
    activation: ActivationName = "gelu"
    """Activation of the MLPs."""
    biases: BiasName = "query_value"
    """Which of queries, keys and values have biases: VideoMAE's leave out the keys', ViT's are on all."""
    qk_norm: bool = False
    """Normalise queries and keys in each head."""
    layer_scale: float | None = None
    """First value of learned factors on each branch; null has none."""
    norm_eps: float = LAYER_NORM_EPS
    """What layer norms add to the variance."""
    input_norm: bool = False
    """Normalise tokens before the first block, as CLIP does."""

    def sizes(self) -> Variant:
        """Returns width, depth, heads and MLP ratio: the ones given, else the variant's."""
        published = VARIANTS[self.variant]
        given = {name: getattr(self, name) for name in Variant._fields}
        return published._replace(**{name: value for name, value in given.items() if value is not None})

    def resolved(self) -> "EncoderConfig":
        """Returns the same architecture with width, depth, heads and MLP ratio spelt out."""
        return dataclasses.replace(self, **self.sizes()._asdict())

    def block(self) -> BlockConfig:
        """Returns what all blocks of the encoder share."""
        width, _, heads, mlp_ratio = self.sizes()
        return BlockConfig(
            width, heads, mlp_ratio, self.activation, self.biases, self.qk_norm, self.layer_scale, self.norm_eps
        )

    def validate(self, frames: int, size: Size, field: str = "encoder") -> None:
        """Checks the architecture for clips of `frames` frames of `size`.

        Args:
            frames: Frames of a clip.
            size: Height and width of a clip in pixels.
            field: The name that this group of fields has in the run's configuration.

        Raises:
            Refused: A size cannot be, or does not divide.
        """
        width, depth, heads, mlp_ratio = self.sizes()
        refuse_below_one(
            field, width=width, depth=depth, heads=heads, temporal_depth=self.temporal_depth, mlp_ratio=mlp_ratio
        )
        height, breadth = (size, size) if isinstance(size, int) else size
        t, h, w = self.tubelet
        if min(t, h, w) < 1:
            raise Refused(f"{field}.tubelet: {t} x {h} x {w} must be at least 1 x 1 x 1")
        if frames % t:
            raise Refused(f"data.clip.frames: {frames} frames do not divide into tubelets of {t}; change one of them")
        if height % h or breadth % w:
            raise Refused(f"data.clip.size: {size} pixels do not divide into tubelets of {h} x {w}; change one of them")
        self._validate_stem(field)
        self._validate_heads(field, width, heads)
        self._validate_positions(field, width // heads)
        if not 0 <= self.drop_path < 1:
            raise Refused(f"{field}.drop_path: {self.drop_path} must be at least 0 and less than 1")
        if self.layer_scale is not None and not 0 < self.layer_scale < math.inf:
            raise Refused(f"{field}.layer_scale: {self.layer_scale} must be greater than 0; leave it out to have none")
        if not 0 < self.norm_eps < 1:
            raise Refused(f"{field}.norm_eps: {self.norm_eps} must be greater than 0 and less than 1")

    def _validate_stem(self, field: str) -> None:
        t, h, w = self.tubelet
        if self.stem == "residual_attention" and min(h, w) < SMALLEST_STEM_SIDE:
            raise Refused(
                f"{field}.stem: residual_attention halves a tubelet's height and width three times, and "
                f"{field}.tubelet is {t} x {h} x {w}; give sides of at least {SMALLEST_STEM_SIDE}, or the linear stem"
            )

    def _validate_heads(self, field: str, width: int, heads: int) -> None:
        if width % heads:
            raise Refused(f"{field}.heads: {heads} heads do not divide {field}.width {width}; change one")
        if width % 2:
            raise Refused(f"{field}.width: {width} must be even")
        if self.name == "factorised_dot_product" and heads % 2:
            raise Refused(
                f"{field}.heads: {heads} is odd, but {field}.name factorised_dot_product puts half of the heads in "
                f"space and half in time; use an even number"
            )

    def _validate_positions(self, field: str, head_width: int) -> None:
        if not 1 < self.position_temperature < math.inf:
            raise Refused(f"{field}.position_temperature: {self.position_temperature} must be greater than 1")
        if self.positions not in WITH_WAVELENGTHS and self.position_temperature != TEMPERATURE:
            raise Refused(f"{field}.position_temperature: {self.positions} positions have none; leave it out")
        if self.positions == "rotary" and (head_width < 6 or head_width % 2):
            raise Refused(
                f"{field}.positions: rotary turns pairs of a head's channels for each of three axes, but "
                f"{field}.width and {field}.heads make heads of {head_width}; use an even width of at least 6"
            )


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

    block: type[ResidualBlock] = Block
    has_class_tokens = False
    """Whether the design has class tokens from pretraining on, wanted or not."""

    def __init__(
        self,
        config: EncoderConfig,
        frames: int,
        size: Size,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        class_token: bool = False,
    ) -> None:
        """Creates and initialises the weights."""
        super().__init__()
        width, depth, heads, _ = config.sizes()
        self.config = config.resolved()
        self.width = width
        self.grid: Grid = grid_of(frames, size, config.tubelet)
        self.embedding = STEMS[config.stem](config.tubelet, width, mean, std)
        self.positions = PositionEmbedding(config.positions, self.grid, width, config.position_temperature)
        has_class_token = class_token or self.has_class_tokens
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if has_class_token else None
        self.input_norm = config.block().norm() if config.input_norm else nn.Identity()
        rates = drop_path_rates(depth + self._temporal_depth(config), config.drop_path)
        self.blocks = stack(self.block, config.block(), depth, rates[:depth])
        self.norm: nn.Module = config.block().norm()
        self._build_rest(config, rates[depth:])
        self.rotary = None
        if config.positions == "rotary":
            self.rotary = RotaryEmbedding(width // heads, config.position_temperature)
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

    def coordinates(self, clips: Tensor, visible: Tensor | None) -> Tensor:
        """Returns slot, row and column `(B, Nv, 3)` of the tokens that `embed` returns."""
        if visible is None:
            visible = torch.arange(self.grid.tokens, device=clips.device).expand(clips.shape[0], -1)
        return coordinates_of(visible, self.grid)

    def turns(self, clips: Tensor, visible: Tensor | None, before: int = 0) -> Rotary | None:
        """Returns the turns of `before` class tokens and the tokens that `embed` returns; None without rotary."""
        return None if self.rotary is None else self.rotary(self.coordinates(clips, visible), before)

    def forward(self, clips: Tensor, visible: Tensor | None = None, visible_slots: int | None = None) -> Encoded:
        """Encodes clips.

        Args:
            clips: `(B, T, H, W, C)`: uint8, or floats that are normalised already.
            visible: `(B, Nv)` ascending token numbers, or None for all tokens.
            visible_slots: Number of slots that hold visible tokens, S, in every clip of the batch; None for all slots.
                What else must hold for a design, `compatibility.py` tells.
        """
        raise NotImplementedError

    def leave_out_last_norm(self) -> None:
        """Takes away the layer norm behind the last block, for a head that normalises the mean of the tokens."""
        self.norm = nn.Identity()

    def leave_out_other_tokens(self) -> None:
        """Spares the last block the other tokens where it can, for a head that reads the class token alone.

        `forward` then may return no tokens beside the class token.
        """

    @property
    def layers(self) -> int:
        """Number of blocks that follow each other."""
        return len(self.blocks)

    def layer_of(self, name: str) -> int:
        """Returns a parameter's layer for layer-wise decay: 0 before the blocks, i + 1 in block i, then the rest.

        A class token that pretraining has not seen counts among the rest: it is new in finetuning, like the head.
        """
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        before = name.startswith(("embedding.", "positions.", "input_norm."))
        return 0 if before or (name == "class_token" and self.has_class_tokens) else self.layers + 1
