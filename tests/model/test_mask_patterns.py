"""Patterns of masks: blocks where they belong, cut and filled; running cells as published."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.model.mask_patterns import first_covering, running_cell
from pretrain.model.masking import MaskConfig, draw_mask
from pretrain.model.tubelets import Grid

CLIP = Grid(8, 14, 14)


def hidden_area(config: MaskConfig, grid: Grid, key: int) -> np.ndarray:
    """Returns what is masked, bool (Tt, Ht, Wt)."""
    hidden = np.ones(grid.tokens, dtype=bool)
    hidden[draw_mask(config, grid, key, 0)[0]] = False
    return hidden.reshape(grid)


def corner_and_extent(hidden: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns first corner and size of the smallest box around what is hidden."""
    places = np.argwhere(hidden)
    return tuple(places.min(0).tolist()), tuple((np.ptp(places, axis=0) + 1).tolist())


SQUARE = {"blocks": 1, "block_area": 0.25, "block_aspect": (1.0, 1.0)}


def test_a_block_of_just_the_right_size_is_a_box_anywhere_in_every_slot():
    found = {
        corner_and_extent(hidden_area(MaskConfig("block", 0.25, **SQUARE), Grid(3, 8, 8), key)) for key in range(300)
    }
    assert found == {((0, row, column), (3, 4, 4)) for row in range(5) for column in range(5)}


def test_a_short_block_is_a_box_anywhere_in_time_too():
    config = MaskConfig("block", 0.125, **SQUARE, block_slots=2)
    found = {corner_and_extent(hidden_area(config, Grid(4, 8, 8), key)) for key in range(900)}
    assert found == {((slot, row, column), (2, 4, 4)) for slot in range(3) for row in range(5) for column in range(5)}


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_a_union_of_blocks_is_cut_or_filled_to_the_exact_count(ratio):
    grid = Grid(2, 8, 8)
    for key in range(20):
        (hidden, other) = hidden_area(MaskConfig("block", ratio, **SQUARE), grid, key)
        (whole, _) = hidden_area(MaskConfig("block", 0.25, **SQUARE), grid, key)
        assert np.array_equal(hidden, other)
        assert hidden.sum() == int(ratio * 64)
        assert np.all(hidden <= whole) if ratio < 0.25 else np.all(whole <= hidden)


def test_a_cut_takes_from_the_last_block_first():
    grid, two = Grid(1, 8, 8), {**SQUARE, "blocks": 2}
    for key in range(20):
        first, both = (hidden_area(MaskConfig("block", 0.25, **blocks), grid, key) for blocks in (SQUARE, two))
        covered = first_covering(key, grid, 2, 0.25, (1.0, 1.0), None).reshape(grid)
        assert np.array_equal(both, covered == 0)
        assert (covered < 2).sum() > 16 or np.array_equal(first, both)


def test_the_aspect_ratio_of_blocks_is_drawn_between_its_bounds():
    config = MaskConfig("block", 0.25, blocks=1, block_area=0.25, block_aspect=(0.25, 4.0))
    extents = set()
    for key in range(200):
        covered = first_covering(key, Grid(1, 16, 16), 1, config.block_area, config.block_aspect, None)
        extents.add(corner_and_extent(covered.reshape(16, 16) == 0)[1])
    ratios = [height / width for height, width in extents]
    assert min(ratios) < 0.5
    assert max(ratios) > 3.5
    assert all(0.25 <= ratio <= 4 for ratio in ratios)
    assert all(abs(height * width - 64) <= 8 for height, width in extents), "sides are rounded to whole tokens"


def test_blocks_cover_what_the_readme_says():
    readme = (Path(__file__).parents[2] / "pretrain/model/README.md").read_text()
    found = re.search(
        r"two blocks of 0\.7 .* cover (0\.\d+) on average, eight of 0\.15 \(.*?\) (0\.\d+)\.", readme, re.DOTALL
    )
    for told, blocks, area in zip(found.groups(), (2, 8), (0.7, 0.15), strict=True):
        covered = [(first_covering(key, CLIP, blocks, area, (0.75, 1.5), None) < blocks).mean() for key in range(800)]
        assert abs(np.mean(covered) - float(told)) < 0.015
    default = MaskConfig()
    assert (default.blocks, default.block_area, default.block_aspect) == (2, 0.7, (0.75, 1.5))


def published_running_cells(kept: int, grid: Grid) -> list[np.ndarray]:
    """Returns the four maps of VideoMAE V2, True where a token is decoded: a queue of four that moves on each slot."""
    queue = np.array([False] * (4 - kept) + [True] * kept)
    cells = [[np.roll(queue, -(start + slot)).reshape(2, 2) for slot in range(grid.slots)] for start in range(4)]
    return [np.stack([np.tile(cell, (grid.rows // 2, grid.columns // 2)) for cell in clip]) for clip in cells]


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_running_cells_are_those_of_videomae_v2(kept):
    grid = Grid(8, 4, 6)
    published = {cells.tobytes() for cells in published_running_cells(kept, grid)}
    drawn = set()
    for key in range(40):
        chosen = np.zeros(grid.tokens, dtype=bool)
        chosen[running_cell(key, grid, np.arange(grid.tokens), grid.tokens * kept // 4)] = True
        drawn.add(chosen.tobytes())
        turns = chosen.reshape(2, 4, 2, 2, 3, 2).sum(1)
        assert np.all(turns == kept), "over four slots each place of each cell has its turn equally often"
    assert drawn == published


@settings(max_examples=50, deadline=None)
@given(
    st.builds(Grid, st.integers(1, 6), st.integers(1, 8), st.integers(1, 8)),
    st.integers(0, 2**128 - 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.randoms(use_true_random=False),
)
def test_running_cells_choose_any_masked_tokens_phase_by_phase(grid, key, share_masked, share_chosen, random):
    masked = np.sort(random.sample(range(grid.tokens), int(share_masked * grid.tokens))).astype(int)
    chosen = running_cell(key, grid, masked, int(share_chosen * len(masked)))
    assert len(set(chosen.tolist())) == len(chosen) == int(share_chosen * len(masked))
    slot, row, column = np.unravel_index(masked, grid)
    places = np.array([[0, 1], [2, 3]])[row % 2, column % 2] + slot
    is_chosen = np.isin(np.arange(len(masked)), chosen)
    phases = [(places + shift) % 4 for shift in range(4)]
    assert any(phase[is_chosen].max(initial=0) <= phase[~is_chosen].min(initial=3) for phase in phases)
