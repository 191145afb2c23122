"""Clips become tubelets and tubelets become tokens (ViViT, arXiv 2103.15691, section 3.2).

Only the tubelets that are asked for are normalised and embedded, straight from uint8: with 90 % of a clip masked, nine
tenths of the work and of the memory is never spent.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Grid(NamedTuple):
    """The token grid of a clip: slots, rows and columns."""

    slots: int
    rows: int
    columns: int

    @property
    def positions(self) -> int:
        """Tokens in one slot."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Tokens in a clip, N."""
        return self.slots * self.positions


Size = int | tuple[int, int]
"""Height and width in pixels; one number is both."""


def grid_of(frames: int, size: Size, tubelet: tuple[int, int, int]) -> Grid:
    """Returns the token grid of a clip of `frames` frames of `size`."""
    height, width = (size, size) if isinstance(size, int) else size
    return Grid(frames // tubelet[0], height // tubelet[1], width // tubelet[2])


def coordinates_of(numbers: Tensor, grid: Grid) -> Tensor:
    """Returns slot, row and column `(..., 3)` of token numbers `(...)`."""
    place = numbers % grid.positions
    return torch.stack([numbers // grid.positions, place // grid.columns, place % grid.columns], -1)


def cut_tubelets(clips: Tensor, tubelet: tuple[int, int, int]) -> Tensor:
    """Cuts clips into tubelets.

    Args:
        clips: `(B, T, H, W, C)`, any type.
        tubelet: Frames, height and width of a tubelet (t, h, w).

    Returns:
        `(B, N, P)`, values of a tubelet in the order (t, h, w, C).
    """
    B, T, H, W, C = clips.shape
    t, h, w = tubelet
    tubelets = clips.view(B, T // t, t, H // h, h, W // w, w, C).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return tubelets.reshape(B, (T // t) * (H // h) * (W // w), t * h * w * C)


def take_tubelets(clips: Tensor, numbers: Tensor, tubelet: tuple[int, int, int]) -> Tensor:
    """Cuts no more than some tubelets out of clips: those of `numbers` from `cut_tubelets(clips, tubelet)`.

    Args:
        clips: `(B, T, H, W, C)`, any type.
        numbers: `(B, K)` token numbers.
        tubelet: Frames, height and width of a tubelet (t, h, w).

    Returns:
        `(B, K, P)`, values of a tubelet in the order (t, h, w, C).
    """
    B, T, H, W, C = clips.shape
    t, h, w = tubelet
    grid = grid_of(T, (H, W), tubelet)
    slot, row, column = coordinates_of(numbers, grid).unbind(-1)
    clip, frame, line = (torch.arange(length, device=clips.device) for length in (B, t, h))
    # A tubelet is t * h lines of w pixels; a line's number counts those of all clips.
    first = ((clip.unsqueeze(1) * T + slot * t) * H + row * h) * grid.columns + column  # (B, K)
    lines = first.unsqueeze(-1) + ((frame.unsqueeze(1) * H + line) * grid.columns).flatten()  # (B, K, t * h)
    return clips.reshape(-1, w * C).index_select(0, lines.flatten()).view(*numbers.shape, t * h * w * C)


class TubeletEmbedding(nn.Module):
    """Embeds tubelets linearly; the same map as a 3D convolution with stride equal to its kernel.

    Args:
        tubelet: Frames, height and width of a tubelet.
        width: Width of a token, D.
        mean: Mean of each colour channel, for values in [0, 1].
        std: Standard deviation of each colour channel.
        features: Number of values that a stem computes of a tubelet for the projection; None projects its pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tubelet: tuple[int, int, int],
        width: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        features: int | None = None,
    ) -> None:
        """Creates the projection, Xavier-initialised as in MAE."""
        super().__init__()
        self.tubelet = tubelet
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        self.projection = nn.Linear(features or math.prod(tubelet) * len(mean), width)
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, clips: Tensor, visible: Tensor | None = None) -> Tensor:
        """Embeds all tubelets, or those of the token numbers `visible`.

        Args:
            clips: `(B, T, H, W, C)`: uint8, normalised here, or floats that are normalised already.
            visible: `(B, Nv)` token numbers, or None for all.

        Returns:
            `(B, Nv, D)` or `(B, N, D)`.
        """
        if visible is None:
            return self.embed(cut_tubelets(clips, self.tubelet))
        return self.embed(take_tubelets(clips, visible, self.tubelet))

    def embed(self, tubelets: Tensor) -> Tensor:
        """Embeds tubelets `(..., P)`, uint8 or normalised floats, as `(..., D)`."""
        return self.projection(self._normalised(tubelets))

    def _normalised(self, tubelets: Tensor) -> Tensor:
        if tubelets.dtype == torch.uint8:
            colours = tubelets.unflatten(-1, (-1, len(self.mean))).float()
            tubelets = ((colours / 255 - self.mean) / self.std).flatten(-2)
        return tubelets.to(self.projection.weight.dtype)
