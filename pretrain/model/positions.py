"""Position embeddings: where a token stands in its clip.

sincos       VideoMAE's (arXiv 2203.12602): the sine-cosine embedding of Vaswani et al. (2017) of the token number
sincos_3d    slot, row and column embedded apart, each in a part of the channels, as MAE (arXiv 2111.06377) does for
             images; tokens of one slot, row or column are alike from the start, so small models learn much faster
learned      ViT's (arXiv 2010.11929): one vector for each token
separable    mae_st's (arXiv 2205.09113): a vector for the slot and one for the place within it, added
factorised   NaViT's (arXiv 2307.06304) with time: a vector for the slot, one for the row, one for the column, added
spatial      X-CLIP's (arXiv 2208.02816): a vector for the place within the slot, the same in every slot
rotary       nothing is added; attention turns queries and keys by slot, row and column (arXiv 2104.09864 in 3D)
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.model.attention import Rotary
from pretrain.model.tubelets import Grid

PositionName = Literal["sincos", "sincos_3d", "learned", "separable", "factorised", "spatial", "rotary"]

POSITIONS: tuple[PositionName, ...] = get_args(PositionName)
WITH_WAVELENGTHS = ("sincos", "sincos_3d", "rotary")
"""Kinds that a temperature means something to."""
WITH_COORDINATES = ("sincos_3d", "separable", "factorised", "rotary")
"""Kinds that know slot, row and column, and so take grids of any size."""

TEMPERATURE = 10000.0
"""The customary temperature (Vaswani et al., 2017)."""


def sincos_table(length: int, width: int, temperature: float = TEMPERATURE) -> Tensor:
    """Returns `(length, width)`: sines at even, cosines at odd channels, wavelengths 2 pi to 2 pi * temperature."""
    channels = torch.arange(width, dtype=torch.float64)
    frequencies = temperature ** (-2 * (channels // 2) / width)
    angles = torch.arange(length, dtype=torch.float64).unsqueeze(1) * frequencies
    table = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
    return table.float()


def axis_tables(grid: Grid, width: int, temperature: float = TEMPERATURE) -> list[Tensor]:
    """Returns the sine-cosine tables of slots, rows and columns.

    A quarter of the channels is for the slots; rows and columns share the rest.
    """
    slot_width = width // 8 * 2
    row_width = (width - slot_width) // 4 * 2
    widths = (slot_width, row_width, width - slot_width - row_width)
    return [sincos_table(length, part, temperature) for length, part in zip(grid, widths, strict=True)]


def position_table(kind: str, grid: Grid, width: int, temperature: float = TEMPERATURE) -> Tensor:
    """Returns the fixed table `(N, width)` of `sincos` or `sincos_3d`."""
    if kind == "sincos":
        return sincos_table(grid.tokens, width, temperature)
    slots, rows, columns = axis_tables(grid, width, temperature)
    parts = slots[:, None, None], rows[None, :, None], columns[None, None]
    return torch.cat([part.expand(*grid, -1) for part in parts], -1).flatten(0, 2)


def fixed_kind(kind: str) -> str:
    """Returns the kind for a decoder, which has no positions of its own to learn: the fixed one nearest to `kind`."""
    return "sincos_3d" if kind in WITH_COORDINATES else "sincos"


def temporal_kind(kind: str) -> str:
    """Returns the kind for tokens that stand for whole slots, where the tokens within slots have `kind`."""
    return {"separable": "learned", "factorised": "learned"}.get(kind, kind)


class PositionEmbedding(nn.Module):
    """Adds to each token the embedding of where it stands.

    Args:
        kind: One of `POSITIONS`.
        grid: The token grid of a clip.
        width: Width of a token, D.
        temperature: Greatest wavelength of a fixed table over the smallest.
    """

    table: Tensor
    places: Tensor
    slots: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, kind: str, grid: Grid, width: int, temperature: float = TEMPERATURE) -> None:
        """Creates the tables; a fixed one is not stored with the weights."""
        super().__init__()
        self.kind = kind
        self.grid = grid
        for name, length in self._learned(kind, grid).items():
            self.register_parameter(name, nn.Parameter(torch.empty(1, length, width)))
            nn.init.trunc_normal_(self.get_parameter(name), std=0.02)
        if kind in ("sincos", "sincos_3d"):
            table = position_table(kind, grid, width, temperature)
            self.register_buffer("table", table.unsqueeze(0), persistent=False)
        if kind == "sincos_3d":
            for name, axis in zip(("slots", "rows", "columns"), axis_tables(grid, width, temperature), strict=True):
                self.register_buffer(name, axis.unsqueeze(0), persistent=False)

    @staticmethod
    def _learned(kind: str, grid: Grid) -> dict[str, int]:
        """Returns the learned tables of a kind with their lengths."""
        return {
            "learned": {"table": grid.tokens},
            "separable": {"slots": grid.slots, "places": grid.positions},
            "factorised": {"slots": grid.slots, "rows": grid.rows, "columns": grid.columns},
            "spatial": {"places": grid.positions},
        }.get(kind, {})

    def forward(self, tokens: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Returns tokens `(B, K, D)` with positions added: of `numbers` `(B, K)`, or of 0 .. K - 1."""
        if self.kind == "rotary":
            return tokens
        embedded = self.whole() if numbers is None else self.of(numbers)
        return tokens + embedded.to(tokens.dtype)  # DeepSpeed halves weights and leaves fixed tables as they are

    def whole(self) -> Tensor:
        """Returns the embeddings `(1, N, D)` of all tokens of a clip."""
        if self.kind == "spatial":
            return self.places.repeat(1, self.grid.slots, 1)
        if self.kind == "separable":
            return (self.slots.unsqueeze(2) + self.places.unsqueeze(1)).flatten(1, 2)
        if self.kind == "factorised":
            in_slot = (self.rows.unsqueeze(2) + self.columns.unsqueeze(1)).flatten(1, 2)
            return (self.slots.unsqueeze(2) + in_slot.unsqueeze(1)).flatten(1, 2)
        return self.table

    def of(self, numbers: Tensor) -> Tensor:
        """Returns the embeddings `(B, K, D)` of token numbers `(B, K)`."""
        return functional.embedding(numbers, self.whole().squeeze(0))

    def at(self, coordinates: Tensor) -> Tensor:
        """Returns the embeddings `(B, K, D)` of slots, rows and columns `(B, K, 3)`, for kinds that know them.

        The grid that the embedding was made for bounds them; other clips may have other grids within it.
        """
        slot, row, column = coordinates.unbind(-1)
        if self.kind == "separable":
            return self.slots[0, slot] + self.places[0, row * self.grid.columns + column]
        parts = self.slots[0, slot], self.rows[0, row], self.columns[0, column]
        return torch.cat(parts, -1) if self.kind == "sincos_3d" else parts[0] + parts[1] + parts[2]


class RotaryEmbedding(nn.Module):
    """Makes the turns of `Rotary` from slots, rows and columns, a third of a head's channels for each (3D RoPE).

    Args:
        head_width: Channels of a head, D / Hd; at least 6. What does not divide among the axes is not turned.
        temperature: Greatest wavelength over the smallest.
    """

    frequencies: Tensor

    def __init__(self, head_width: int, temperature: float = TEMPERATURE) -> None:
        """Creates the frequencies `(3, head_width / 2)`, of which each axis has its own stretch."""
        super().__init__()
        pairs = head_width // 6
        frequencies = torch.zeros(3, head_width // 2)
        for axis in range(3):
            frequencies[axis, axis * pairs : (axis + 1) * pairs] = temperature ** (-torch.arange(pairs) / pairs)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, coordinates: Tensor, before: int = 0, after: int = 0) -> Rotary:
        """Returns the turns of tokens at `coordinates` `(B, K, 3)`, among `before` and `after` tokens that do not turn.

        Returns:
            Cosines and sines `(B, 1, before + K + after, head_width)`.
        """
        # Not a matrix product, which autocast would round: angles are of up to a grid's length and need all digits.
        angles = (coordinates.unsqueeze(-1) * self.frequencies).sum(-2)
        angles = functional.pad(angles, (0, 0, before, after)).unsqueeze(1).repeat(1, 1, 1, 2)
        return Rotary(angles.cos(), angles.sin())


def resampled(weights: dict[str, Tensor], old: Grid, new: Grid) -> dict[str, Tensor]:
    """Returns the learned tables of a `PositionEmbedding` for another grid: other frames, sizes or shapes.

    Space is interpolated bicubically, as timm does for images, and time linearly.

    Args:
        weights: `table`, `places`, `slots`, `rows` and `columns`, as many of them as there are, each `(1, length, D)`.
        old: The grid that they were made for.
        new: The grid that they are wanted for.
    """
    shapes = {
        "table": (old, new),
        "places": (Grid(1, old.rows, old.columns), Grid(1, new.rows, new.columns)),
        "slots": (Grid(old.slots, 1, 1), Grid(new.slots, 1, 1)),
        "rows": (Grid(1, old.rows, 1), Grid(1, new.rows, 1)),
        "columns": (Grid(1, 1, old.columns), Grid(1, 1, new.columns)),
    }
    return {name: _resampled_table(table, *shapes[name]) for name, table in weights.items()}


def _resampled_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    if old == new:
        return table
    grid = table.float().reshape(*old, -1).permute(0, 3, 1, 2)  # (Tt, D, Ht, Wt)
    if old[1:] != new[1:]:
        grid = functional.interpolate(grid, (new.rows, new.columns), mode="bicubic", antialias=True)
    if old.slots != new.slots:
        in_time = grid.permute(1, 2, 3, 0).flatten(0, 2).unsqueeze(1)  # (D * Ht * Wt, 1, Tt)
        in_time = functional.interpolate(in_time, new.slots, mode="linear")
        grid = in_time.reshape(-1, new.rows, new.columns, new.slots).permute(3, 0, 1, 2)
    return grid.permute(0, 2, 3, 1).reshape(1, new.tokens, -1).to(table.dtype)
