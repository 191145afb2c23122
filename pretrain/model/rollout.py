"""Attention rollout: from which tubelets the attention of all blocks brings what a head reads (arXiv 2005.00928).

Each attention layer counts as half the identity, for the residual, and half its weights, averaged over heads; the
product of all layers tells how much of each tubelet stands in a token behind the last block. Values, MLPs and norms are
left out, as in the paper: rollout tells where a model looks, not which class speaks from what it finds.

The fused kernels return no weights, so they are computed again from what each layer was given, one layer and one head
at a time. A head reads one mixture of tokens, so that a single row goes through the layers, from the last to the first,
and no product of matrices is kept.

    joint                      one row through all blocks
    factorised_encoder         the temporal row says how much of each slot, the spatial rows (of the mean over a slot's
                               tokens) how much of each tubelet in it; the product of both
    factorised_self_attention  two layers in each block, each with its residual; weights off the axis are 0
    factorised_dot_product     one layer; heads in space and heads in time are averaged alike
    cross_frame                a slot's message is its class token, so that what reads the message reads, by half the
                               attention among messages and half the identity, the class tokens of the slots
"""

import contextlib
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.model.attention import Attention, AxialAttention
from pretrain.model.encoder import Encoder
from pretrain.model.encoders import CrossFrameEncoder, FactorisedEncoder


class Compared(NamedTuple):
    """What an attention layer compared.

    Attributes:
        queries: `(B, Hd, Nq, D / Hd)`.
        keys: `(B, Hd, Nk, D / Hd)`.
        masks: For each head what it may see, as wide as `(B, Nq, Nk)` or broadcast to it, boolean or added to the
            scores; None is everything.
    """

    queries: Tensor
    keys: Tensor
    masks: Sequence[Tensor | None] | None = None

    def weights(self) -> Iterator[Tensor]:
        """Yields the attention `(B, Nq, Nk)` of each head; a row sums to 1."""
        heads, width = self.queries.shape[1], self.queries.shape[-1]
        masks = self.masks or [None] * heads
        for query, key, mask in zip(self.queries.unbind(1), self.keys.unbind(1), masks, strict=True):
            scores = query.float() @ key.float().transpose(1, 2) / math.sqrt(width)
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
            yield scores.softmax(-1)

    def mean(self) -> Tensor:
        """Returns the attention `(B, Nq, Nk)`, the mean over heads."""
        total = torch.zeros((), device=self.queries.device)
        for weights in self.weights():
            total = total + weights
        return total / self.queries.shape[1]


class Shares(NamedTuple):
    """How much of each token stands in what a head reads; the two sum to 1 for each clip.

    Attributes:
        tokens: `(B, N)`, of the tubelets.
        class_tokens: `(B,)`, of class tokens, which show nothing of the clip.
    """

    tokens: Tensor
    class_tokens: Tensor


Calls = dict[nn.Module, dict[str, Any]]
"""With what each attention layer was called last, by the names of its arguments."""


@contextlib.contextmanager
def watching_attention(encoder: nn.Module) -> Iterator[Calls]:
    """Keeps, within the context, what attention layers are called with; what they compute is the same to the bit."""
    calls: Calls = {}

    def keep(attention: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        bound = inspect.signature(attention.forward).bind(*inputs, **named)
        calls[attention] = dict(bound.arguments)

    layers = [module for module in encoder.modules() if isinstance(module, Attention)]
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def compared(attention: nn.Module, call: dict[str, Any]) -> Compared:
    """Returns what a layer compared in a call that `watching_attention` kept."""
    if isinstance(attention, AxialAttention):
        return _compared_along_axes(attention, **call)
    assert isinstance(attention, Attention), "nothing else is watched"
    return _compared_freely(attention, **call)


def rollout(encoder: Encoder, calls: Calls, read: Tensor | None = None) -> Shares:
    """Rolls attention out over an encoder.

    Args:
        encoder: The encoder, whose layers were watched on clips without hidden tubelets, or on a packed sequence.
        calls: What `watching_attention` kept of them.
        read: `(B, K)` how much a head reads of each token of `Encoded.last()`, summing to 1; None where it reads the
            class token.
    """
    if isinstance(encoder, FactorisedEncoder):
        return _through_both_transformers(encoder, calls, read)
    if isinstance(encoder, CrossFrameEncoder):
        return _through_messages(encoder, calls, read)
    layers = [compared(attention, call) for attention, call in calls.items()]  # in the order of their calls
    return _through_layers(layers, read, 0 if encoder.class_token is None else 1)


def _through_layers(layers: list[Compared], read: Tensor | None, class_tokens: int) -> Shares:
    """Takes the row of the class token, or that of the tokens behind class tokens, through layers in their order."""
    device = layers[0].queries.device
    row = torch.ones(1, 1, device=device) if read is None else functional.pad(read.float(), (class_tokens, 0))
    for layer in reversed(layers):
        row = _before(layer.mean(), row)
    return Shares(row[:, class_tokens:], row[:, :class_tokens].sum(1))


def _before(weights: Tensor, row: Tensor) -> Tensor:
    """Returns `(B, Nk)`: of what the tokens behind a layer, mixed by `row`, are made. Queries are the first tokens."""
    queries, keys = weights.shape[1:]
    row = functional.pad(row, (0, queries - row.shape[1])).expand(len(weights), -1)
    attended = (row.unsqueeze(1) @ weights).squeeze(1)
    return (functional.pad(row, (0, keys - queries)) + attended) / 2


def _through_both_transformers(encoder: FactorisedEncoder, calls: Calls, read: Tensor | None) -> Shares:
    temporal, spatial = (
        [_compared_in(block, "attention", calls) for block in blocks]
        for blocks in (encoder.temporal_blocks, encoder.blocks)
    )
    slots = _through_layers(temporal, read, 0 if encoder.class_token is None else 1)
    n = encoder.grid.positions
    mean = torch.full((1, n), 1 / n, device=slots.tokens.device)
    positions = _through_layers(spatial, mean, 0).tokens.view(*slots.tokens.shape, n)
    return Shares((slots.tokens.unsqueeze(2) * positions).flatten(1), slots.class_tokens)


def _through_messages(encoder: CrossFrameEncoder, calls: Calls, read: Tensor | None) -> Shares:
    S, n = encoder.grid.slots, encoder.grid.positions
    layers = [
        [_compared_in(block, name, calls) for name in ("attention", "message_attention")] for block in encoder.blocks
    ]
    queries = layers[0][1].queries
    B = len(queries)
    if read is None:
        row = functional.pad(torch.full((B, S, 1), 1 / S, device=queries.device), (0, n))  # (B, S, 1 + n)
    else:
        row = functional.pad(read.float().view(B, S, n), (1, 0))
    for within, among in reversed(layers):
        # The message is the last key of a slot; nothing behind the block reads what it becomes.
        before = _before(within.mean(), row.flatten(0, 1)).view(B, S, 1 + n + 1)
        told = _before(among.mean(), before[..., -1]).unsqueeze(2)
        row = torch.cat([before[..., :1] + told, before[..., 1:-1]], 2)
    return Shares(row[..., 1:].flatten(1), row[..., 0].sum(1))


def _compared_in(block: nn.Module, name: str, calls: Calls) -> Compared:
    layer = block.get_submodule(name)
    return compared(layer, calls[layer])


def _compared_freely(
    attention: Attention,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    mask: Tensor | None = None,
    rotary: Any = None,
) -> Compared:
    if key is None:
        queries, keys, _ = attention.project(query, rotary)
    else:
        queries, keys, _ = attention.project_apart(query, key, key if value is None else value)
    if mask is None:
        return Compared(queries, keys)
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    return Compared(queries, keys, mask.expand(-1, attention.heads, -1, -1).unbind(1))


def _compared_along_axes(
    attention: AxialAttention, tokens: Tensor, slots: int, class_tokens: int = 0, rotary: Any = None
) -> Compared:
    queries, keys, _ = attention.project(tokens, rotary)
    number = torch.arange(tokens.shape[1] - class_tokens, device=tokens.device)
    positions = len(number) // slots
    masks = []
    for axis in (number // positions, number % positions):
        mask = axis.unsqueeze(1) == axis
        # Class tokens look at every token, and every token at them.
        masks.append(functional.pad(mask, (class_tokens, 0, class_tokens, 0), value=True).unsqueeze(0))
    in_space, in_time = masks
    time_heads = attention.heads - attention.space_heads
    return Compared(queries, keys, [in_space] * attention.space_heads + [in_time] * time_heads)
