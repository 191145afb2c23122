"""Multi-head attention (Vaswani et al., 2017) on torch's fused kernels, with the masks that the house needs.

Attention         one input: self-attention; three: a query looks into other tokens
AxialAttention    some heads look within a slot, the others within a position (ViViT's models 3 and 4)
block_diagonal    the mask of packed sequences: tokens of one clip see each other and nothing else
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BiasName = Literal["query_value", "all"]

QK_NORM_EPS = 1e-6


class Rotary(NamedTuple):
    """Cosines and sines `(B or 1, 1, N, D / Hd)` by which queries and keys are turned."""

    cosine: Tensor
    sine: Tensor

    def turn(self, heads: Tensor) -> Tensor:
        """Turns `(B, Hd, N, D / Hd)`: channels in pairs, one from each half (RoFormer, arXiv 2104.09864)."""
        first, second = heads.chunk(2, -1)
        turned = heads * self.cosine + torch.cat([-second, first], -1) * self.sine
        return turned.to(heads.dtype)


class LinearWithGivenBias(nn.Linear):
    """A linear layer that is called with its bias, also by what wraps it, such as an adapter."""

    def forward(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns `(..., outputs)` for `(..., inputs)`."""
        return functional.linear(inputs, self.weight, bias)


class Attention(nn.Module):
    """Multi-head attention.

    Args:
        width: Width of a token, D; a multiple of `heads`.
        heads: Number of heads, Hd.
        biases: `query_value` as in VideoMAE and BEiT, where keys have no bias since softmax does not see it, or `all`
            as in ViT.
        qk_norm: Normalise queries and keys in each head (arXiv 2302.05442).
        norm_eps: What that adds to the variance.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        biases: BiasName = "query_value",
        qk_norm: bool = False,
        norm_eps: float = QK_NORM_EPS,
    ) -> None:
        """Creates one projection for queries, keys and values, and the output projection."""
        super().__init__()
        self.heads = heads
        self.qkv = LinearWithGivenBias(width, 3 * width, bias=False)
        self.query_bias = nn.Parameter(torch.zeros(width))
        self.key_bias = nn.Parameter(torch.zeros(width)) if biases == "all" else None
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.query_norm = nn.LayerNorm(width // heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(width // heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.projection = nn.Linear(width, width)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | BlockMask | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Lets each query attend to all keys, or to those that the mask allows.

        Args:
            query: `(B, Nq, D)`.
            key: `(B, Nk, D)`; None is the query.
            value: `(B, Nk, D)`; None is the key.
            mask: Which keys a query may see: boolean, or added to the scores, as wide as `(B, Hd, Nq, Nk)` or
                broadcast to it; or a `BlockMask`.
            rotary: How queries and keys of self-attention are turned.

        Returns:
            `(B, Nq, D)`.
        """
        if key is None:
            queries, keys, values = self.project(query, rotary)
        else:
            queries, keys, values = self.project_apart(query, key, key if value is None else value)
        return self.merge(attend(queries, keys, values, mask))

    def project(self, tokens: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values, each `(B, Hd, N, D / Hd)`, of tokens `(B, N, D)`."""
        qkv = self.qkv(tokens, torch.cat(self._biases()))
        # Three chunks and not one permutation: their gradients are put side by side in a single copy.
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        query, key = self._normalised(query, key)
        if rotary is not None:
            query, key = rotary.turn(query), rotary.turn(key)
        return query, key, value

    def merge(self, attended: Tensor) -> Tensor:
        """Puts heads `(B, Hd, N, D / Hd)` side by side and projects them to `(B, N, D)`."""
        return self.projection(attended.transpose(1, 2).flatten(2))

    def project_apart(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values, each `(B, Hd, N, D / Hd)`, of three inputs `(B, N, D)`."""
        projected = self._thirds(*inputs)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected)
        return *self._normalised(query, key), value

    def _thirds(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Projects each input by its third of the projection."""
        if isinstance(self.qkv, nn.Linear):
            return list(map(functional.linear, (query, key, value), self.qkv.weight.chunk(3), self._biases()))
        bias = torch.cat(self._biases())  # what wraps the projection has no thirds
        keyed = self.qkv(key, bias).chunk(3, -1)
        valued = keyed if value is key else self.qkv(value, bias).chunk(3, -1)
        return [self.qkv(query, bias).chunk(3, -1)[0], keyed[1], valued[2]]

    def _normalised(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Normalises in each head; autocast would return full precision, which flex attention does not mix."""
        return self.query_norm(query).to(query.dtype), self.key_norm(key).to(key.dtype)

    def _biases(self) -> tuple[Tensor, Tensor, Tensor]:
        key_bias = torch.zeros_like(self.query_bias) if self.key_bias is None else self.key_bias
        return self.query_bias, key_bias, self.value_bias


class AxialAttention(Attention):
    """Attention along the axes of the token grid: within slots, within positions, or both in one layer.

    The first `space_heads` heads take keys and values of the same slot, the others those of the same position: all of
    them and none are the two layers of ViViT's model 3, half of them is its model 4 (arXiv 2103.15691, section 3.3).
    Class tokens stand outside the grid: they look at every token, and every group has them as further keys.

    Args:
        width: Width of a token, D.
        heads: Number of heads, Hd.
        space_heads: How many of them look within a slot.
        biases: As for `Attention`.
        qk_norm: As for `Attention`.
        norm_eps: As for `Attention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        space_heads: int,
        biases: BiasName = "query_value",
        qk_norm: bool = False,
        norm_eps: float = QK_NORM_EPS,
    ) -> None:
        """Creates the projections of `Attention`, no more and no others."""
        super().__init__(width, heads, biases, qk_norm, norm_eps)
        self.space_heads = space_heads

    def forward(  # type: ignore[override]
        self, tokens: Tensor, slots: int, class_tokens: int = 0, rotary: Rotary | None = None
    ) -> Tensor:
        """Lets tokens attend along their axes.

        Args:
            tokens: `(B, E + N, D)`: E class tokens, then equally many tokens of each slot, slot by slot, at the same
                positions in every slot.
            slots: Number of slots, S.
            class_tokens: Number of class tokens, E.
            rotary: How queries and keys are turned.

        Returns:
            `(B, E + N, D)`.
        """
        qkv = self.project(tokens, rotary)
        in_space = _within_groups([part[:, : self.space_heads] for part in qkv], slots, class_tokens, along_time=False)
        in_time = _within_groups([part[:, self.space_heads :] for part in qkv], slots, class_tokens, along_time=True)
        attended = torch.cat([in_space, in_time], 1)
        if class_tokens:
            query, key, value = qkv
            attended = torch.cat([attend(query[:, :, :class_tokens], key, value), attended], 2)
        return self.merge(attended)


def _within_groups(qkv: list[Tensor], slots: int, class_tokens: int, along_time: bool) -> Tensor:
    """Attends within slots or within positions: three `(B, Hd, E + N, d)` give `(B, Hd, N, d)`."""
    B, heads, length, d = qkv[0].shape
    if not heads:
        return qkv[0][:, :, class_tokens:]

    def grouped(part: Tensor) -> Tensor:
        groups = part[:, :, class_tokens:].reshape(B * heads, slots, -1, d)
        return groups.transpose(1, 2) if along_time else groups

    def with_class_tokens(part: Tensor) -> Tensor:
        groups = grouped(part)
        if not class_tokens:
            return groups
        shared = part[:, :, :class_tokens].reshape(B * heads, 1, class_tokens, d)
        return torch.cat([shared.expand(-1, groups.shape[1], -1, -1), groups], 2)

    query, key, value = qkv
    attended = attend(grouped(query), with_class_tokens(key), with_class_tokens(value))
    if along_time:
        attended = attended.transpose(1, 2)
    return attended.reshape(B, heads, length - class_tokens, d)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
    """Returns softmax(Q K^T / sqrt(d) + mask) V for heads `(B, Hd, N, d)`."""
    if isinstance(mask, BlockMask):
        return flex_attention(query, key, value, block_mask=mask)  # type: ignore[return-value]
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """Returns `(length, length)` booleans: a token sees itself and those before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def block_diagonal(query_segments: Tensor, key_segments: Tensor | None = None) -> Tensor | BlockMask:
    """Returns the mask under which tokens see those of their own segment only (NaViT, arXiv 2307.06304).

    Args:
        query_segments: `(B, Nq)` numbers of the segments that queries belong to.
        key_segments: `(B, Nk)` those of the keys; None for the same tokens.

    Returns:
        In a model that is compiled for a GPU a `BlockMask`, whose empty blocks cost nothing; else booleans
        `(B, 1, Nq, Nk)`, since without compilation flex attention stores the scores of all heads.
    """
    keys = query_segments if key_segments is None else key_segments
    if not (query_segments.is_cuda and torch.compiler.is_compiling()):
        return (query_segments.unsqueeze(2) == keys.unsqueeze(1)).unsqueeze(1)

    def same_segment(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query_segments[b, query] == keys[b, key]

    B, length = query_segments.shape
    return create_block_mask(same_segment, B, None, length, keys.shape[1], device=query_segments.device)
