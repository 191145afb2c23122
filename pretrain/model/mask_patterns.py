"""The patterns of the masks: which parts of a token grid a key hides, and which hidden tokens a key decodes.

Everything is drawn from raw words of Philox, since numpy's generator methods may change between versions. To choose
some of n things is to take the first in the order of n words, or of a rank and then of n words.
"""

import math
from collections.abc import Callable

import numpy as np

from pretrain.model.tubelets import Grid


def random(key: int, grid: Grid, count: int) -> np.ndarray:
    """Hides `count` tokens; this and the other patterns return bool (Tt, Ht * Wt), True where a token is hidden."""
    hidden = np.zeros((grid.slots, grid.positions), dtype=bool)
    hidden.reshape(-1)[subset(key, grid.tokens, count)] = True
    return hidden


def random_per_slot(key: int, grid: Grid, count: int) -> np.ndarray:
    """Hides `count` positions in each slot, drawn for each alone."""
    words = _words(key, grid.tokens).reshape(grid.slots, grid.positions)
    hidden = np.zeros((grid.slots, grid.positions), dtype=bool)
    np.put_along_axis(hidden, np.argsort(words, axis=1, kind="stable")[:, :count], True, axis=1)
    return hidden


def tube(key: int, grid: Grid, count: int) -> np.ndarray:
    """Hides the same `count` positions in every slot."""
    hidden = np.zeros((grid.slots, grid.positions), dtype=bool)
    hidden[:, subset(key, grid.positions, count)] = True
    return hidden


def frame(key: int, grid: Grid, count: int) -> np.ndarray:
    """Hides `count` whole slots."""
    hidden = np.zeros((grid.slots, grid.positions), dtype=bool)
    hidden[subset(key, grid.slots, count)] = True
    return hidden


def causal(key: int, grid: Grid, count: int) -> np.ndarray:
    """Hides the last `count` slots, whatever the key."""
    hidden = np.zeros((grid.slots, grid.positions), dtype=bool)
    hidden[grid.slots - count :] = True
    return hidden


PATTERNS: dict[str, Callable[[int, Grid, int], np.ndarray]] = {
    pattern.__name__: pattern for pattern in (random, random_per_slot, tube, frame, causal)
}


def block(
    key: int, grid: Grid, count: int, blocks: int, area: float, aspect: tuple[float, float], slots: int | None
) -> np.ndarray:
    """Hides the union of blocks, cut or filled to an exact count.

    The blocks of a clip have one size, with an aspect ratio drawn evenly, and each lies anywhere within the grid. From
    a union that is too large, tokens that the last blocks alone cover are taken away at random; to one that is too
    small, tokens are added at random.

    Args:
        key: 128-bit Philox key.
        grid: The token grid.
        count: What is hidden in the end: positions of every slot, or tokens if `slots` is given.
        blocks: Number of blocks.
        area: Share of the positions of a slot that a block covers.
        aspect: Least and greatest height of a block over its width.
        slots: Duration of a block; None is all slots.

    Source:
        Multi-block masking of V-JEPA, arXiv 2404.08471, which cuts the masks of a batch to the shortest among them.
    """
    rank = first_covering(key, grid, blocks, area, aspect, slots)
    words = _words(key, 1 + 3 * blocks + len(rank))[1 + 3 * blocks :]
    hidden = np.zeros((len(rank) // grid.positions, grid.positions), dtype=bool)
    hidden.reshape(-1)[_first(rank, words, count)] = True
    return np.repeat(hidden, grid.slots, axis=0) if slots is None else hidden


def first_covering(
    key: int, grid: Grid, blocks: int, area: float, aspect: tuple[float, float], slots: int | None
) -> np.ndarray:
    """Returns which block is the first to cover each position, or each token if `slots` is given; `blocks` is none.

    Args:
        key: 128-bit Philox key.
        grid: The token grid.
        blocks: Number of blocks.
        area: As for `block`.
        aspect: As for `block`.
        slots: As for `block`.

    Returns:
        `(Ht * Wt,)`, or `(N,)` if `slots` is given.
    """
    words = _words(key, 1 + 3 * blocks)
    share = float(words[0] >> np.uint64(11)) * 2.0**-53
    size = (slots or 1, *_block_size(grid, area, aspect[0] + share * (aspect[1] - aspect[0])))
    covered = Grid(1, grid.rows, grid.columns) if slots is None else grid
    first = np.full(covered, blocks)
    room = [whole - part + 1 for whole, part in zip(covered, size, strict=True)]
    for number in reversed(range(blocks)):
        corner = words[1 + 3 * number : 4 + 3 * number].tolist()
        slot, row, column = (word % places for word, places in zip(corner, room, strict=True))
        first[slot : slot + size[0], row : row + size[1], column : column + size[2]] = number
    return first.reshape(-1)


def running_cell(key: int, grid: Grid, masked: np.ndarray, count: int) -> np.ndarray:
    """Chooses `count` of the masked tokens in cells of 2 x 2 positions whose chosen place moves on with the slot.

    The places of a cell are numbered row by row; place p of slot t has phase (p + t + shift) mod 4, with one random
    shift for the whole clip. Tokens are chosen by phase, those of phase 0 first, and at random within the last phase
    that is needed: half of the tokens of cells that are masked as a whole are those of phases 0 and 1. Over four slots
    each place of a cell has each phase once.

    Args:
        key: 128-bit Philox key.
        grid: The token grid.
        masked: Numbers of the masked tokens.
        count: How many of them to choose.

    Returns:
        `(count,)` indexes into `masked`.

    Source:
        Running cell masking of VideoMAE V2, arXiv 2303.16727, whose counts differ from clip to clip.
    """
    words = _words(key, 1 + len(masked))
    slot, row, column = np.unravel_index(masked, grid)
    phase = (2 * (row % 2) + column % 2 + slot + int(words[0] % 4)) % 4
    return _first(phase, words[1:], count)


def subset(key: int, count: int, chosen: int) -> np.ndarray:
    """Returns `chosen` of the numbers 0 .. count - 1, in random order."""
    return np.argsort(_words(key, count), kind="stable")[:chosen]


def _words(key: int, count: int) -> np.ndarray:
    return np.random.Philox(key=key).random_raw(count)


def _first(rank: np.ndarray, words: np.ndarray, count: int) -> np.ndarray:
    """Returns the indexes of the `count` things of lowest rank, those of equal rank in the order of their words."""
    return np.lexsort((words, rank))[:count]


def _block_size(grid: Grid, area: float, aspect: float) -> tuple[int, int]:
    """Returns height and width in tokens of a block of a share of the grid's area, at least 1 and within the grid."""
    tokens = area * grid.positions
    height, width = math.sqrt(tokens * aspect), math.sqrt(tokens / aspect)
    return min(max(round(height), 1), grid.rows), min(max(round(width), 1), grid.columns)
