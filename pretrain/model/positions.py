"""Position embeddings: where a token stands in its clip.

sincos             VideoMAE's (arXiv 2203.12602): the sine-cosine embedding of Vaswani et al. (2017) of the token
                   number
sincos_separable   slot, row and column embedded apart, each in a part of the channels, as MAE (arXiv 2111.06377)
                   does for images; tokens of one slot, row or column are alike from the start, so small models
                   learn much faster
learned            ViT's (arXiv 2010.11929): one vector for each token, trained
"""

import torch
from torch import Tensor, nn

from pretrain.model.tubelets import Grid, take_tokens

TEMPERATURE = 10000.0
"""The customary temperature (Vaswani et al., 2017)."""


def sincos_table(length: int, width: int, temperature: float = TEMPERATURE) -> Tensor:
    """Returns `(length, width)`: sines at even, cosines at odd channels, wavelengths 2 pi to 2 pi * temperature."""
    channels = torch.arange(width, dtype=torch.float64)
    frequencies = temperature ** (-2 * (channels // 2) / width)
    angles = torch.arange(length, dtype=torch.float64).unsqueeze(1) * frequencies
    table = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
    return table.float()


def separable_table(grid: Grid, width: int, temperature: float = TEMPERATURE) -> Tensor:
    """Returns `(N, width)`: a quarter of the channels for the slot, the rest shared by row and column."""
    slot_width = width // 8 * 2
    row_width = (width - slot_width) // 4 * 2
    widths = (slot_width, row_width, width - slot_width - row_width)
    parts = []
    for axis, (length, part_width) in enumerate(zip(grid, widths, strict=True)):
        shape = [1, 1, 1, part_width]
        shape[axis] = length
        parts.append(sincos_table(length, part_width, temperature).reshape(shape).expand(*grid, part_width))
    return torch.cat(parts, -1).reshape(grid.tokens, width)


def position_table(kind: str, grid: Grid, width: int, temperature: float = TEMPERATURE) -> Tensor:
    """Returns the fixed table `(N, width)` of `kind`; a learned one starts elsewhere and has none."""
    if kind == "sincos_separable":
        return separable_table(grid, width, temperature)
    return sincos_table(grid.tokens, width, temperature)


class PositionEmbedding(nn.Module):
    """Adds to each token the embedding of its number.

    Args:
        kind: `sincos`, `sincos_separable` or `learned`.
        grid: The token grid of a clip, whose N numbers a token can have.
        width: Width of a token, D.
        temperature: Greatest wavelength of a fixed table over the smallest.
    """

    def __init__(self, kind: str, grid: Grid, width: int, temperature: float = TEMPERATURE) -> None:
        """Creates the table; a fixed one is not stored with the weights."""
        super().__init__()
        if kind == "learned":
            self.table = nn.Parameter(torch.empty(1, grid.tokens, width))
            nn.init.trunc_normal_(self.table, std=0.02)
        else:
            table = position_table(kind, grid, width, temperature)
            self.register_buffer("table", table.unsqueeze(0), persistent=False)

    def forward(self, tokens: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Returns tokens `(B, K, D)` with positions added: of `numbers` `(B, K)`, or of 0 .. K - 1."""
        if numbers is None:
            return tokens + self.table
        return tokens + self.of(numbers)

    def of(self, numbers: Tensor) -> Tensor:
        """Returns the embeddings `(B, K, D)` of token numbers `(B, K)`."""
        return take_tokens(self.table.expand(len(numbers), -1, -1), numbers)
