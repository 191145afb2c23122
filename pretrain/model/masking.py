"""Which tokens the encoder sees: pure functions of a key, with exact counts, as sorted token numbers.

    random            any tokens are masked (mae_st, arXiv 2205.09113)
    random_per_slot   any tokens are masked, equally many in each slot
    tube              the same positions are masked in every slot (VideoMAE, arXiv 2203.12602)
    frame             whole slots are masked
    block             the union of a few blocks of positions is masked (V-JEPA, arXiv 2404.08471)
    causal            the last slots are masked: see the past, predict what comes next

The decoder reconstructs the masked tokens or a part of them (dual masking, VideoMAE V2, arXiv 2303.16727). Not every
encoder can take every mask: `compatibility.py` holds the table. How each pattern is drawn is in `mask_patterns.py`.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import numpy as np

from pretrain.errors import Refused
from pretrain.model import mask_patterns
from pretrain.model.compatibility import GUARANTEES, Structure, fits
from pretrain.model.tubelets import Grid

MaskName = Literal["random", "random_per_slot", "tube", "frame", "block", "causal"]
DecodedPattern = Literal["random", "running_cell"]

WHOLE_SLOTS = ("frame", "causal")  # masks of slots that are hidden as a whole


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """What is hidden from the encoder, and what of it the decoder must show."""

    name: MaskName = "tube"
    """The shape of the mask."""
    ratio: float = 0.9
    """Share that is masked: of slots (frame, causal), positions (tube, random_per_slot, block) or tokens (others)."""
    decoded: float = 1.0
    """Share of the masked tokens that the decoder reconstructs (dual masking, VideoMAE V2); of a causal mask the share
    of the masked slots, the nearest in time."""
    decoded_pattern: DecodedPattern = "random"
    """How that share is chosen: at random, or as VideoMAE V2's running cell."""
    blocks: int = 2
    """Number of a block mask's blocks, which may overlap; 2 are V-JEPA's long-range mask, 8 its short-range one."""
    block_area: float = 0.7
    """Share of the positions of a slot that one block covers; 0.15 for V-JEPA's short-range mask. Their union is cut or
    filled to mask.ratio at random, so choose numbers that agree."""
    block_aspect: tuple[float, float] = (0.75, 1.5)
    """Least and greatest height of a block over its width, both in tokens."""
    block_slots: int | None = None
    """Duration of a block in slots, which makes mask.ratio a share of the tokens; None is all slots."""

    @property
    def kind(self) -> str:
        """The mask's name in the table of what fits what."""
        return "short block" if self.name == "block" and self.block_slots is not None else self.name

    def as_shown(self) -> "MaskConfig":
        """Returns the same mask with all decoded that training decodes at any time, for pictures."""
        return self if self.name == "causal" else dataclasses.replace(self, decoded=1.0)

    def validate(self, encoder: str, grid: Grid) -> None:
        """Checks the mask for an encoder and its token grid.

        Args:
            encoder: The encoder's name.
            grid: The token grid of a clip.

        Raises:
            Refused: `encoder` cannot take the mask, a number cannot be, or nothing is left to see or to reconstruct.
        """
        self._validate_kind(encoder)
        if not 0 < self.ratio < 1:
            raise Refused(f"mask.ratio: {self.ratio} must lie between 0 and 1")
        if not 0 < self.decoded <= 1:
            raise Refused(f"mask.decoded: {self.decoded} must be greater than 0 and at most 1")
        self._validate_pattern(grid)
        self._validate_blocks(grid)
        self._validate_counts(grid)

    def _validate_kind(self, encoder: str) -> None:
        if fits(encoder, self.kind):
            return
        if self.kind == "short block":
            raise Refused(
                f"mask.block_slots: the {encoder} encoder cannot take a short block mask; leave it out for blocks of "
                f"full duration"
            )
        *others, last = (kind for kind in GUARANTEES if fits(encoder, kind))
        raise Refused(
            f"mask.name: the {encoder} encoder cannot take a {self.name} mask; use {', '.join(others)} or {last}"
        )

    def _validate_pattern(self, grid: Grid) -> None:
        if self.decoded_pattern == "random":
            return
        if self.name == "causal":
            raise Refused(
                f"mask.decoded_pattern: a causal mask (mask.name) decodes the nearest slots whole, not in a "
                f"{self.decoded_pattern}; leave it out"
            )
        if self.decoded == 1:
            raise Refused(
                f"mask.decoded_pattern: a {self.decoded_pattern} is a part of the masked tokens, but mask.decoded 1.0 "
                f"is all of them; lower that, 0.5 is VideoMAE V2's"
            )
        if min(grid.rows, grid.columns) < 2:
            raise Refused(
                f"mask.decoded_pattern: a {self.decoded_pattern} is 2 x 2 positions, but a slot has {grid.rows} x "
                f"{grid.columns} by data.clip.size and encoder.tubelet; use random"
            )

    def _validate_blocks(self, grid: Grid) -> None:
        if self.name != "block":
            for name in ("blocks", "block_area", "block_aspect", "block_slots"):
                if getattr(self, name) != getattr(MaskConfig, name):
                    raise Refused(f"mask.{name}: a {self.name} mask (mask.name) has no blocks; leave it out")
            return
        if not 1 <= self.blocks <= grid.tokens:
            raise Refused(
                f"mask.blocks: {self.blocks} must be at least 1 and at most the {grid.tokens} tokens of a clip"
            )
        if not 0 < self.block_area < 1:
            raise Refused(f"mask.block_area: {self.block_area} must lie between 0 and 1")
        if not 0 < self.block_aspect[0] <= self.block_aspect[1] < math.inf:
            raise Refused(
                f"mask.block_aspect: {list(self.block_aspect)} must be two numbers greater than 0, the least first"
            )
        if self.block_slots is not None and not 1 <= self.block_slots < grid.slots:
            raise Refused(
                f"mask.block_slots: {self.block_slots} must be at least 1 and less than the {grid.slots} slots that "
                f"data.clip.frames and encoder.tubelet give; leave it out for blocks of full duration"
            )

    def _validate_counts(self, grid: Grid) -> None:
        if self.name in WHOLE_SLOTS and grid.slots < 2:
            raise Refused(
                f"mask.name: a {self.name} mask hides whole slots, but data.clip.frames and encoder.tubelet give one "
                f"slot; use a longer clip or another mask"
            )
        visible, decoded, _ = mask_counts(self, grid)
        masked = grid.tokens - visible
        if not visible or not masked:
            raise Refused(
                f"mask.ratio: {self.ratio} of {grid.slots} x {grid.rows} x {grid.columns} tokens leaves {visible} "
                f"visible and {masked} to reconstruct; choose a ratio that leaves some of both"
            )
        if not decoded:
            things = f"{masked // grid.positions} masked slots" if self.name == "causal" else f"{masked} masked tokens"
            raise Refused(f"mask.decoded: {self.decoded} of {things} leaves none to reconstruct; raise it")


class MaskCounts(NamedTuple):
    """How many tokens every mask of a configuration has.

    Attributes:
        visible: Visible tokens, Nv.
        decoded: Masked tokens that the decoder reconstructs, Nm.
        visible_slots: Slots with any visible token, S; None where the number differs from key to key.
    """

    visible: int
    decoded: int
    visible_slots: int | None


def mask_counts(config: MaskConfig, grid: Grid) -> MaskCounts:
    """Returns the counts of tokens and slots, which are the same for every key."""
    parts, hidden = _parts(config, grid)
    masked = hidden * (grid.tokens // parts)
    if config.name == "causal":
        decoded = _share(config.decoded, hidden) * grid.positions
    else:
        decoded = _share(config.decoded, masked)
    if GUARANTEES[config.kind] == Structure.ANY:
        visible_slots = None
    else:
        visible_slots = grid.slots - hidden if config.name in WHOLE_SLOTS else grid.slots
    return MaskCounts(grid.tokens - masked, decoded, visible_slots)


def draw_mask(config: MaskConfig, grid: Grid, mask_key: int, decoder_key: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws the mask of one clip.

    Args:
        config: The mask.
        grid: The clip's token grid.
        mask_key: 128-bit Philox key that decides what is visible.
        decoder_key: 128-bit Philox key that decides which masked tokens are reconstructed.

    Returns:
        `(Nv,)` visible and `(Nm,)` masked token numbers, both int64 and ascending.
    """
    hidden = _hidden(config, grid, mask_key)
    masked = np.flatnonzero(hidden)
    count = mask_counts(config, grid).decoded
    if config.name == "causal" or count == len(masked):
        decoded = masked[:count]
    elif config.decoded_pattern == "running_cell":
        decoded = np.sort(masked[mask_patterns.running_cell(decoder_key, grid, masked, count)])
    else:
        decoded = np.sort(masked[mask_patterns.subset(decoder_key, len(masked), count)])
    return np.flatnonzero(~hidden), decoded


def _hidden(config: MaskConfig, grid: Grid, key: int) -> np.ndarray:
    count = _parts(config, grid)[1]
    if config.name == "block":
        blocks = config.blocks, config.block_area, config.block_aspect, config.block_slots
        return mask_patterns.block(key, grid, count, *blocks)
    return mask_patterns.PATTERNS[config.name](key, grid, count)


def _parts(config: MaskConfig, grid: Grid) -> tuple[int, int]:
    """Returns of how many parts (slots, positions or tokens) a mask hides how many."""
    if config.name in WHOLE_SLOTS:
        parts = grid.slots
    elif config.kind in ("random", "short block"):
        parts = grid.tokens
    else:
        parts = grid.positions
    return parts, _share(config.ratio, parts)


def _share(ratio: float, count: int) -> int:
    """Rounds down, but forgives binary fractions: 0.29 of 100 is 29."""
    return int(ratio * count + 1e-9)
