"""Which tokens the encoder sees: pure functions of a key, with exact counts, as sorted token numbers.

    tube     the same positions are masked in every slot (VideoMAE, arXiv 2203.12602)
    random   any tokens are masked (mae_st, arXiv 2205.09113)

Not every encoder can take every mask: a factorised encoder needs slots that hold equally many visible tokens. `FITS`
is the one table of what goes together.
"""

import dataclasses
from typing import Literal

import numpy as np

from pretrain.errors import Refused
from pretrain.model.tubelets import Grid

MaskName = Literal["tube", "random"]

FITS: dict[str, tuple[MaskName, ...]] = {
    "joint": ("tube", "random"),
    "factorised_encoder": ("tube",),
    "factorised_self_attention": ("tube",),
    "factorised_dot_product": ("tube",),
    "cross_frame": ("tube",),
}


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """What is hidden from the encoder, and what of it the decoder must show."""

    name: MaskName = "tube"
    """The shape of the mask."""
    ratio: float = 0.9
    """Share of the tokens that is masked."""
    decoded: float = 1.0
    """Share of the masked tokens that the decoder reconstructs, drawn at random (VideoMAE V2 calls it dual masking)."""

    def validate(self, encoder: str, grid: Grid) -> None:
        """Raises `Refused` for a mask that `encoder` cannot take or that leaves nothing to see or to reconstruct."""
        if self.name not in FITS[encoder]:
            raise Refused(
                f"mask.name: the {encoder} encoder cannot take a {self.name} mask; use {' or '.join(FITS[encoder])}"
            )
        if not 0 < self.ratio < 1:
            raise Refused(f"mask.ratio: {self.ratio} must lie between 0 and 1")
        if not 0 < self.decoded <= 1:
            raise Refused(f"mask.decoded: {self.decoded} must be greater than 0 and at most 1")
        visible, decoded = mask_counts(self, grid)
        masked = grid.tokens - visible
        if not visible or not masked:
            raise Refused(
                f"mask.ratio: {self.ratio} of {grid.slots} x {grid.rows} x {grid.columns} tokens leaves {visible} "
                f"visible and {masked} to reconstruct; choose a ratio that leaves some of both"
            )
        if not decoded:
            raise Refused(
                f"mask.decoded: {self.decoded} of {masked} masked tokens leaves none to reconstruct; raise it"
            )


def mask_counts(config: MaskConfig, grid: Grid) -> tuple[int, int]:
    """Returns how many tokens are visible and how many are reconstructed, Nv and Nm."""
    if config.name == "tube":
        masked = _share(config.ratio, grid.positions) * grid.slots
    else:
        masked = _share(config.ratio, grid.tokens)
    return grid.tokens - masked, _share(config.decoded, masked)


def draw_mask(config: MaskConfig, grid: Grid, mask_key: int, decoder_key: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws the mask of one clip.

    Args:
        config: The mask.
        grid: The clip's token grid.
        mask_key: 128-bit Philox key that decides what is visible.
        decoder_key: 128-bit Philox key that decides which masked tokens are reconstructed.

    Returns:
        `(Nv,)` visible and `(Nm,)` masked token numbers, both ascending.
    """
    hidden = np.zeros(grid.tokens, dtype=bool)
    if config.name == "tube":
        masked_positions = _subset(mask_key, grid.positions, _share(config.ratio, grid.positions))
        hidden.reshape(grid.slots, grid.positions)[:, masked_positions] = True
    else:
        hidden[_subset(mask_key, grid.tokens, _share(config.ratio, grid.tokens))] = True
    masked = np.flatnonzero(hidden)
    decoded = np.sort(masked[_subset(decoder_key, len(masked), _share(config.decoded, len(masked)))])
    return np.flatnonzero(~hidden), decoded


def _share(ratio: float, count: int) -> int:
    """Rounds down, but forgives binary fractions: 0.29 of 100 is 29."""
    return int(ratio * count + 1e-9)


def _subset(key: int, count: int, chosen: int) -> np.ndarray:
    words = np.random.Philox(key=key).random_raw(count)
    return np.argsort(words, kind="stable")[:chosen]
