"""Clips as tokens in sequences of fixed length: the crop of a clip, its tubelets, and their places. Pure functions.

Only the tubelets that the model reads are taken, so that workers hand over no more than those.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from pretrain.data.clips import MULTI_SCALE_OFFSETS, MULTI_SCALES, Box, ClipConfig
from pretrain.data.randomness import permutation, raw_words, uniform
from pretrain.data.sequence_plan import ClipGrid, Packing


class ClipTokens(NamedTuple):
    """The tokens of one clip that a model reads.

    Attributes:
        tubelets: `(Nv, P)` uint8, those that are visible.
        coordinates: `(Nv, 3)` slot, row and column of each.
        decoded_tubelets: `(Nm, P)` uint8, those that the decoder reconstructs.
        decoded_coordinates: `(Nm, 3)`.
    """

    tubelets: torch.Tensor
    coordinates: torch.Tensor
    decoded_tubelets: torch.Tensor
    decoded_coordinates: torch.Tensor


class Sequences(NamedTuple):
    """Packed sequences, S of them: L places for visible tokens and M for decoded ones in each.

    Attributes:
        tubelets: `(S, L, P)` uint8, values in the order (t, h, w, C).
        coordinates: `(S, L, 3)` slot, row and column of each token in its clip.
        segments: `(S, L)` number of its clip in the sequence, -1 in places that hold no token.
        decoded_tubelets: `(S, M, P)` uint8.
        decoded_coordinates: `(S, M, 3)`.
        decoded_segments: `(S, M)`.
    """

    tubelets: torch.Tensor
    coordinates: torch.Tensor
    segments: torch.Tensor
    decoded_tubelets: torch.Tensor
    decoded_coordinates: torch.Tensor
    decoded_segments: torch.Tensor


def shaped_box(config: ClipConfig, frame: Sequence[int], shape: tuple[int, int], key: int) -> Box:
    """Draws the crop of a packed training clip: the aspect ratio of the clip, and as much of the frame as that allows.

    `multi_scale` takes one of its scales of that at one of its offsets, `random_resized` a share of the area anywhere.

    Args:
        config: The clip.
        frame: Height and width of the stored frames in pixels.
        shape: Height and width of the clip in pixels.
        key: Decides what is drawn.

    Returns:
        Top, left, height and width.
    """
    scale, down, right = 1.0, 0.5, 0.5
    if config.crop == "multi_scale":
        words = raw_words(key, 2)
        scale = MULTI_SCALES[int(words[0] % np.uint64(len(MULTI_SCALES)))]
        down, right = (part / 4 for part in MULTI_SCALE_OFFSETS[int(words[1] % np.uint64(len(MULTI_SCALE_OFFSETS)))])
    elif config.crop == "random_resized":
        share, down, right = uniform(key, 3)
        scale = float(np.sqrt(config.scale[0] + share * (config.scale[1] - config.scale[0])))
    largest = min(whole / part for whole, part in zip(frame, shape, strict=True))
    height, width = (
        min(max(round(part * largest * scale), 1), whole) for part, whole in zip(shape, frame, strict=True)
    )
    return round((frame[0] - height) * down), round((frame[1] - width) * right), height, width


def tokens_of(
    clip: torch.Tensor, grid: ClipGrid, kept: int, packing: Packing, drop_key: int, mask_key: int, decoder_key: int
) -> ClipTokens:
    """Takes the tokens of a clip that a model reads.

    Args:
        clip: `(T, H, W, C)` uint8 of the grid's size.
        grid: Its grid.
        kept: How many of its tokens are kept.
        packing: The masks and the tubelets.
        drop_key: Decides which tokens are kept.
        mask_key: Decides which of these are visible.
        decoder_key: Decides which of the others are decoded.
    """
    chosen = np.sort(permutation(drop_key, grid.tokens)[:kept]) if kept < grid.tokens else np.arange(kept)
    visible, decoded = (chosen[numbers] for numbers in packing.masks.draw(kept, mask_key, decoder_key))
    tubelet = packing.sizing.tubelet
    return ClipTokens(*_take(clip, grid, tubelet, visible), *_take(clip, grid, tubelet, decoded))


def _take(
    clip: torch.Tensor, grid: ClipGrid, tubelet: tuple[int, int, int], numbers: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tubelets `(K, P)` of token numbers `(K,)`, and their coordinates `(K, 3)`."""
    (slots, rows, columns), (t, h, w) = grid, tubelet
    coordinates = torch.from_numpy(np.stack(np.unravel_index(numbers, grid), -1).astype(np.int64))
    blocks = clip.view(slots, t, rows, h, columns, w, -1).permute(0, 2, 4, 1, 3, 5, 6)
    return blocks[tuple(coordinates.T)].flatten(1), coordinates


def fill_sequences(groups: Sequence[Sequence[ClipTokens]], packing: Packing) -> Sequences:
    """Puts the clips of each group one behind the other into a sequence; what is left stays empty."""
    values = groups[0][0].tubelets.shape[1]
    return Sequences(
        *_fill([[(clip.tubelets, clip.coordinates) for clip in group] for group in groups], packing.tokens, values),
        *_fill(
            [[(clip.decoded_tubelets, clip.decoded_coordinates) for clip in group] for group in groups],
            packing.decoded,
            values,
        ),
    )


def _fill(
    groups: list[list[tuple[torch.Tensor, torch.Tensor]]], places: int, values: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tubelets = torch.zeros(len(groups), places, values, dtype=torch.uint8)
    coordinates = torch.zeros(len(groups), places, 3, dtype=torch.int64)
    segments = torch.full((len(groups), places), -1, dtype=torch.int64)
    for sequence, clips in enumerate(groups):
        start = 0
        for number, (one, where) in enumerate(clips):
            end = start + len(one)
            tubelets[sequence, start:end], coordinates[sequence, start:end] = one, where
            segments[sequence, start:end] = number
            start = end
    return tubelets, coordinates, segments
