"""Pre-norm residual attention blocks and stacks of them.

Block                         ViT's (arXiv 2010.11929, equations 2 and 3); with QuickGELU and a mask CLIP's
FactorisedSelfAttentionBlock  ViViT's model 3 (arXiv 2103.15691): space, then time, then the MLP
FactorisedDotProductBlock     ViViT's model 4: half of the heads in space, half in time
CrossFrameBlock               X-CLIP's (arXiv 2208.02816): slots tell each other messages
CrossBlock                    a decoder's, whose tokens look into other tokens only (CrossMAE, arXiv 2401.14391)

timm, whose layers they are made of, takes seconds to import. Configurations need this file but build no block, so timm
is imported where layers are built.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from pretrain.model.attention import Attention, AxialAttention, BiasName, Rotary

LAYER_NORM_EPS = 1e-6

ActivationName = Literal["gelu", "gelu_tanh", "quick_gelu"]


class TanhGELU(nn.GELU):
    """GELU by its tanh approximation."""

    def __init__(self) -> None:
        """Takes no arguments."""
        super().__init__(approximate="tanh")


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What all blocks of a stack share.

    Attributes:
        width: Width of a token, D.
        heads: Number of heads.
        mlp_ratio: Width of the MLP's hidden layer over D.
        activation: The MLP's activation.
        biases: Which of queries, keys and values have biases.
        qk_norm: Normalise queries and keys in each head.
        layer_scale: First value of the factors on each branch (arXiv 2103.17239); None has none.
        norm_eps: What layer norms add to the variance.
    """

    width: int
    heads: int
    mlp_ratio: float = 4.0
    activation: ActivationName = "gelu"
    biases: BiasName = "query_value"
    qk_norm: bool = False
    layer_scale: float | None = None
    norm_eps: float = LAYER_NORM_EPS

    def norm(self) -> nn.LayerNorm:
        """Returns a new layer norm."""
        return nn.LayerNorm(self.width, eps=self.norm_eps)

    def attention(self) -> Attention:
        """Returns a new attention layer."""
        return Attention(self.width, self.heads, self.biases, self.qk_norm, self.norm_eps)

    def axial_attention(self, space_heads: int) -> AxialAttention:
        """Returns a new attention layer along the axes of the token grid."""
        return AxialAttention(self.width, self.heads, space_heads, self.biases, self.qk_norm, self.norm_eps)

    def mlp(self) -> nn.Module:
        """Returns a new MLP."""
        from timm.layers import Mlp
        from timm.layers.activations import QuickGELU

        activations = {"gelu": nn.GELU, "gelu_tanh": TanhGELU, "quick_gelu": QuickGELU}
        return Mlp(self.width, round(self.width * self.mlp_ratio), act_layer=activations[self.activation])

    def scale(self) -> nn.Module:
        """Returns new factors on a branch."""
        from timm.layers import LayerScale

        return nn.Identity() if self.layer_scale is None else LayerScale(self.width, self.layer_scale)


class ResidualBlock(nn.Module):
    """What all blocks end with: z <- z + MLP(LN(z)).

    Args:
        config: What the blocks of a stack share.
        drop_path: Probability that a clip skips a residual branch in training (stochastic depth).
    """

    def __init__(self, config: BlockConfig, drop_path: float = 0.0) -> None:
        """Creates the MLP's branch."""
        from timm.layers import DropPath

        super().__init__()
        self._build_attention(config)
        self.mlp_norm = config.norm()
        self.mlp = config.mlp()
        self.mlp_scale = config.scale()
        self.drop_path = DropPath(drop_path)

    def _build_attention(self, config: BlockConfig) -> None:
        """Creates what comes before the MLP."""
        self.attention_norm = config.norm()
        self.attention = config.attention()
        self.attention_scale = config.scale()

    def add_mlp(self, tokens: Tensor) -> Tensor:
        """Adds the MLP's branch to tokens `(..., D)`."""
        return tokens + self.drop_path(self.mlp_scale(self.mlp(self.mlp_norm(tokens))))


class Block(ResidualBlock):
    """z <- z + MSA(LN(z)); z <- z + MLP(LN(z))."""

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | BlockMask | None = None,
        rotary: Rotary | None = None,
        wanted: slice | None = None,
    ) -> Tensor:
        """Lets tokens attend to each other.

        Args:
            tokens: `(B, N, D)`.
            mask: As for `Attention`.
            rotary: As for `Attention`.
            wanted: Which tokens are returned, without computing the others; not with the two above.

        Returns:
            `(B, N, D)`, or less of N where not all are wanted.
        """
        normed = self.attention_norm(tokens)
        if wanted is None:
            attended = self.attention(normed, mask=mask, rotary=rotary)
        else:
            tokens = tokens[:, wanted]
            attended = self.attention(normed[:, wanted], normed)
        return self.add_mlp(tokens + self.drop_path(self.attention_scale(attended)))


class FactorisedSelfAttentionBlock(ResidualBlock):
    """z <- z + MSA_space(LN(z)); z <- z + MSA_time(LN(z)); z <- z + MLP(LN(z))."""

    def _build_attention(self, config: BlockConfig) -> None:
        self.space_norm, self.time_norm = config.norm(), config.norm()
        self.space_attention = config.axial_attention(space_heads=config.heads)
        self.time_attention = config.axial_attention(space_heads=0)
        self.space_scale, self.time_scale = config.scale(), config.scale()

    def forward(self, tokens: Tensor, slots: int, class_tokens: int = 0, rotary: Rotary | None = None) -> Tensor:
        """`(B, E + N, D)` to `(B, E + N, D)`; arguments as for `AxialAttention.forward`."""
        attended = self.space_attention(self.space_norm(tokens), slots, class_tokens, rotary)
        tokens = tokens + self.drop_path(self.space_scale(attended))
        attended = self.time_attention(self.time_norm(tokens), slots, class_tokens, rotary)
        return self.add_mlp(tokens + self.drop_path(self.time_scale(attended)))


class FactorisedDotProductBlock(ResidualBlock):
    """z <- z + MSA(LN(z)) with half of the heads in space and half in time; z <- z + MLP(LN(z))."""

    def _build_attention(self, config: BlockConfig) -> None:
        super()._build_attention(config)
        self.attention = config.axial_attention(space_heads=config.heads // 2)

    def forward(self, tokens: Tensor, slots: int, class_tokens: int = 0, rotary: Rotary | None = None) -> Tensor:
        """`(B, E + N, D)` to `(B, E + N, D)`; arguments as for `AxialAttention.forward`."""
        attended = self.attention(self.attention_norm(tokens), slots, class_tokens, rotary)
        return self.add_mlp(tokens + self.drop_path(self.attention_scale(attended)))


class CrossFrameBlock(ResidualBlock):
    """Cross-frame attention: each slot's class token sends a message, and each slot reads the message it got back.

    m_t = W z_t[class]; M <- M + CFA(LN(M)); [z_t, m_t] <- [z_t, m_t] + IFA(LN([z_t, m_t])), whose message is dropped;
    z_t <- z_t + MLP(LN(z_t)).
    """

    def _build_attention(self, config: BlockConfig) -> None:
        self.message = nn.Linear(config.width, config.width)
        self.message_norm = config.norm()
        self.message_attention = config.attention()
        super()._build_attention(config)

    def forward(self, tokens: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Lets slots look within themselves and at each other's messages.

        Args:
            tokens: `(B, S, 1 + n, D)`, each slot with its class token first.
            rotary: How queries and keys are turned, `(B * S, 1, 1 + n + 1, D / Hd)`, the message last.

        Returns:
            `(B, S, 1 + n, D)`.
        """
        messages = self.message(tokens[:, :, 0])
        messages = messages + self.drop_path(self.message_attention(self.message_norm(messages)))
        told = torch.cat([tokens, messages.unsqueeze(2)], 2).flatten(0, 1)  # (B * S, 1 + n + 1, D)
        attended = self.attention(self.attention_norm(told), rotary=rotary)[:, :-1].view_as(tokens)
        return self.add_mlp(tokens + self.drop_path(self.attention_scale(attended)))


class CrossBlock(ResidualBlock):
    """z <- z + MCA(LN(z), context); z <- z + MLP(LN(z))."""

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """Lets tokens `(B, N, D)` look into a context `(B, K, D)`; `mask` as for `Attention`."""
        attended = self.attention(self.attention_norm(tokens), context, context, mask)
        return self.add_mlp(tokens + self.drop_path(self.attention_scale(attended)))


class Stack(nn.ModuleList):
    """Blocks one after the other.

    Attributes:
        recomputes: Whether the backward pass computes a block's inner activations again instead of keeping them.
    """

    def __init__(self, blocks: Iterable[nn.Module] = ()) -> None:
        """Takes the blocks."""
        super().__init__(blocks)
        self.recomputes = False

    def forward(self, tokens: Tensor, *others: Any, wanted: slice | None = None) -> Tensor:
        """Passes tokens through every block, each with the same further arguments; `wanted` is for the last `Block`."""
        for number, block in enumerate(self, 1):
            is_last = wanted is not None and number == len(self)
            run = functools.partial(block, wanted=wanted) if is_last else block
            if self.recomputes and torch.is_grad_enabled():
                tokens = checkpoint(run, tokens, *others, use_reentrant=False)
            else:
                tokens = run(tokens, *others)
        return tokens


def stack(block: type[ResidualBlock], config: BlockConfig, depth: int, drop_path: list[float] | None = None) -> Stack:
    """Returns `depth` blocks; `drop_path` holds one probability for each, or there is none."""
    return Stack(block(config, drop_path[layer] if drop_path else 0.0) for layer in range(depth))


def recompute_activations(model: nn.Module) -> None:
    """Lets every stack of a model keep only its blocks' inputs, at the price of a second forward pass."""
    for module in model.modules():
        if isinstance(module, Stack):
            module.recomputes = True


def drop_path_rates(depth: int, last: float) -> list[float]:
    """Returns probabilities that rise linearly from 0 to `last` over the blocks (arXiv 1603.09382)."""
    return torch.linspace(0, last, depth, device="cpu").tolist()


def initialise(module: nn.Module) -> None:
    """Initialises linear layers by Xavier and zeros, as MAE and VideoMAE do; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
