"""How clips of any size, shape and duration share sequences of fixed length: sizes and counts, planned before decoding.

NaViT (Dehghani et al., 2023, arXiv 2307.06304) packs the patches of several images into one sequence. Here a group of
consecutive samples makes a sequence, and all that a sequence holds follows from the shards' indexes: pure functions of
frames, frame rates, heights and widths. Which pixels are cut is `packed_clips.py`'s affair.

    grid      slots, rows and columns of a clip: the video's own aspect ratio, in whole tubelets, within the area of a
              square of `data.clip.size` pixels. Smaller videos are not enlarged, shorter ones have fewer slots.
    kept      tokens of a clip after dropping: where a group's visible tokens are too many for its sequence, each clip
              keeps the same share of its tokens
    visible   kept tokens that the encoder sees; the others are masked
    decoded   masked tokens that the decoder reconstructs
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pretrain.data.clips import ClipConfig
from pretrain.data.order import nearest_divisor
from pretrain.errors import Refused

ROUNDING = 1e-9  # of a tubelet: forgives binary fractions


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """How clips are packed into sequences."""

    group: int = 4
    """Consecutive samples whose clips make a sequence; divides data.micro_batch."""
    tokens: int = 1024
    """Places of a sequence for tokens that the encoder sees; clips that have more together drop tokens evenly."""
    aspect: float = 2.0
    """Greatest ratio of a clip's longer to its shorter side; what goes beyond is cropped."""

    def validate(self, micro_batch: int) -> None:
        """Raises `Refused` for numbers that cannot be, or groups that do not make up a micro-batch."""
        if self.group < 1 or self.tokens < 1:
            raise Refused("data.packing.group, data.packing.tokens: must be at least 1")
        if not 1 <= self.aspect < math.inf:
            raise Refused(f"data.packing.aspect: {self.aspect} must be at least 1 and finite")
        if micro_batch % self.group:
            raise Refused(
                f"data.packing.group: {self.group} clips in a sequence do not divide data.micro_batch {micro_batch}; "
                f"use {nearest_divisor(micro_batch, self.group)}"
            )


class ClipGrid(NamedTuple):
    """The token grid of one clip."""

    slots: int
    rows: int
    columns: int

    @property
    def positions(self) -> int:
        """Tokens in one slot."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Tokens in the clip."""
        return self.slots * self.positions


@dataclasses.dataclass(frozen=True)
class ClipSizing:
    """Which grid the clip of a video has; the rule for rows and columns is Pix2Struct's (arXiv 2210.03347).

    Attributes:
        clip: `frames` is the greatest number of frames, `size` the side of a square of the greatest area.
        aspect: Greatest ratio of the longer to the shorter side.
        tubelet: Frames, height and width of a tubelet.
    """

    clip: ClipConfig
    aspect: float
    tubelet: tuple[int, int, int]

    @property
    def positions(self) -> int:
        """The most tokens that a slot of any clip has."""
        return self.clip.size**2 // (self.tubelet[1] * self.tubelet[2])

    @property
    def largest(self) -> ClipGrid:
        """The most slots, rows and columns that any clip has, though none has the most of all of them."""
        t, h, w = self.tubelet
        side = self.clip.size * math.sqrt(self.aspect)
        rows, columns = (min(int(side / part + ROUNDING), self.positions) for part in (h, w))
        return ClipGrid(self.clip.frames // t, rows, columns)

    def validate(self) -> None:
        """Raises `Refused` for clips that tubelets cannot make up."""
        t, h, w = self.tubelet
        if self.clip.sampling == "segments":
            raise Refused(
                "data.clip.sampling: segments give every clip as many frames, but a clip of data.packing has as many "
                "as its video; use time_window"
            )
        if self.clip.frames % t:
            raise Refused(
                f"data.clip.frames: {self.clip.frames} frames do not divide into tubelets of {t}; change one of them"
            )
        if self.clip.size < max(h, w):
            raise Refused(f"data.clip.size: {self.clip.size} pixels are less than a tubelet of {h} x {w}; raise it")

    def grid(self, frames: int, frame_rate: float, height: int, width: int) -> ClipGrid:
        """Returns the grid of a video's clip.

        Args:
            frames: Frames of the video, at least 1; an image has 1.
            frame_rate: Its frames per second.
            height: Its height in pixels, at least 1.
            width: Its width in pixels, at least 1.
        """
        t, h, w = self.tubelet
        tall, wide = min(height, width * self.aspect), min(width, height * self.aspect)
        scale = min(1.0, self.clip.size / math.sqrt(tall * wide))
        largest = self.largest
        rows = min(max(int(tall * scale / h + ROUNDING), 1), largest.rows)
        columns = min(max(int(wide * scale / w + ROUNDING), 1), largest.columns, self.positions // rows)
        shown = min(self.clip.frames_of(frames, frame_rate), self.clip.frames)
        return ClipGrid(max(shown // t, 1), rows, columns)

    def frames(self, grid: ClipGrid) -> int:
        """Returns the number of frames of a clip."""
        return grid.slots * self.tubelet[0]

    def pixels(self, grid: ClipGrid) -> tuple[int, int]:
        """Returns the height and the width of a clip in pixels."""
        return grid.rows * self.tubelet[1], grid.columns * self.tubelet[2]


class Masks(NamedTuple):
    """What the composing file tells of masks.

    Attributes:
        counts: From a clip's kept tokens to those that are visible and those that are decoded; grows with them.
        draw: From a clip's kept tokens and the keys of `mask` and `decoder_mask` to ascending numbers among them: of
            the visible and of the decoded tokens.
    """

    counts: Callable[[int], tuple[int, int]]
    draw: Callable[[int, int, int], tuple[np.ndarray, np.ndarray]]


def _all_are_visible(kept: int) -> tuple[int, int]:
    return kept, 0


def _draw_nothing(kept: int, mask_key: int, decoder_key: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(kept), np.empty(0, dtype=np.int64)


NO_MASKS = Masks(_all_are_visible, _draw_nothing)
"""For a model that sees all tokens."""


@dataclasses.dataclass(frozen=True)
class Packing:
    """All that the data path knows of packing.

    Attributes:
        sizing: Which grid a clip has.
        group: Clips in a sequence.
        tokens: Places of a sequence for visible tokens, L.
        decoded: Places of a sequence for decoded tokens, M: as many as L visible ones can leave.
        masks: Which tokens are visible and which are decoded.
    """

    sizing: ClipSizing
    group: int
    tokens: int
    decoded: int = 0
    masks: Masks = NO_MASKS

    def validate(self) -> None:
        """Raises `Refused` for sequences that cannot hold one slot of each clip."""
        self.sizing.validate()
        visible = self.masks.counts(self.sizing.positions)[0]
        if visible > self.tokens // self.group:
            size = self.sizing.clip.size
            raise Refused(
                f"data.packing.tokens: {self.tokens} places cannot hold one slot of each of data.packing.group "
                f"{self.group} clips, since data.clip.size {size} gives a slot {visible} visible tokens; use at least "
                f"{visible * self.group}"
            )

    def of_one_clip(self) -> "Packing":
        """Returns the packing of a clip that has a sequence for itself, in which it drops no tokens."""
        most = self.sizing.clip.frames // self.sizing.tubelet[0] * self.sizing.positions
        visible, decoded = self.masks.counts(most)
        return dataclasses.replace(self, group=1, tokens=visible, decoded=decoded)

    def plan(self, grids: Sequence[ClipGrid]) -> "SequencePlan":
        """Plans a sequence; see `plan_sequence`."""
        return plan_sequence(grids, self.tokens, self.masks.counts)


class SequencePlan(NamedTuple):
    """What each clip of a sequence has: its grid, and how many tokens are kept, visible and decoded."""

    grids: tuple[ClipGrid, ...]
    kept: tuple[int, ...]
    visible: tuple[int, ...]
    decoded: tuple[int, ...]


def plan_sequence(grids: Sequence[ClipGrid], tokens: int, counts: Callable[[int], tuple[int, int]]) -> SequencePlan:
    """Drops tokens until a group's visible tokens fit into its sequence: of every clip the same share.

    A clip keeps at least as many tokens as one of its slots has, which `Packing.validate` made sure of.

    Args:
        grids: The grid of each clip.
        tokens: Places of the sequence for visible tokens.
        counts: As in `Masks`.
    """
    total = sum(grid.tokens for grid in grids)

    def kept(quota: int) -> list[int]:
        return [max(grid.tokens * quota // total, grid.positions) for grid in grids]

    def places(quota: int) -> int:
        return sum(counts(count)[0] for count in kept(quota))

    most = total if places(total) <= tokens else bisect.bisect_right(range(total), tokens, key=places) - 1
    if most < 0:
        raise ValueError(f"{len(grids)} clips do not fit into {tokens} places, which `Packing.validate` refuses")
    chosen = kept(most)
    visible, decoded = zip(*map(counts, chosen), strict=True)
    return SequencePlan(tuple(grids), tuple(chosen), visible, decoded)
