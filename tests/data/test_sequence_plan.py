"""Plans of packed sequences: grids within their bounds, sequences that fit, tokens dropped evenly."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.clips import ClipConfig, frame_indices
from pretrain.data.sequence_plan import NO_MASKS, ClipGrid, ClipSizing, Masks, Packing, PackingConfig, plan_sequence
from pretrain.errors import Refused

SIZING = ClipSizing(ClipConfig(frames=16, frame_rate=8.0, size=224), aspect=2.0, tubelet=(2, 16, 16))
VIDEOS = st.tuples(st.integers(1, 600), st.floats(1, 60), st.integers(1, 4000), st.integers(1, 4000))
GRIDS = st.lists(st.builds(ClipGrid, st.integers(1, 8), st.integers(1, 14), st.integers(1, 14)), min_size=1, max_size=8)


def counts_of(ratio: float, share: float = 1.0):
    """Visible and decoded tokens of so many, as random masks have them."""
    return lambda kept: (kept - int(ratio * kept), int(share * int(ratio * kept)))


@given(VIDEOS)
def test_a_grid_stays_within_the_area_the_tables_and_the_video(video):
    frames, rate, height, width = video
    grid = SIZING.grid(frames, rate, height, width)
    assert min(grid) >= 1
    assert all(part <= most for part, most in zip(grid, SIZING.largest, strict=True))
    assert grid.positions <= SIZING.positions == 14 * 14
    shown_height, shown_width = SIZING.pixels(grid)
    assert shown_height <= max(height, 16)
    assert shown_width <= max(width, 16)


@given(VIDEOS)
def test_a_clip_has_as_many_whole_tubelets_of_frames_as_its_video_shows(video):
    frames, rate, height, width = video
    shown = SIZING.frames(SIZING.grid(frames, rate, height, width))

    def is_padded(count: int) -> bool:
        return frame_indices(dataclasses.replace(SIZING.clip, frames=count), frames, rate, 0.5)[1]

    assert shown == 2 or not is_padded(shown)
    assert shown == 16 or is_padded(shown + 2)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (256, 256, 14, 14),
        (240, 320, 12, 16),
        (320, 240, 16, 12),
        (224, 224, 14, 14),
        (64, 96, 4, 6),  # smaller videos are not enlarged
        (5, 5, 1, 1),
        (256, 1024, 9, 19),  # cropped to two to one
    ],
)
def test_a_grid_keeps_the_aspect_ratio_and_the_area(height, width, rows, columns):
    assert SIZING.grid(1, 30.0, height, width) == (1, rows, columns)


@given(GRIDS, st.floats(0.05, 0.95), st.integers(0, 4000))
def test_a_sequence_is_never_over_its_length_and_drops_the_same_share_of_every_clip(grids, ratio, room):
    counts = counts_of(ratio)
    tokens = sum(counts(grid.positions)[0] for grid in grids) + room
    plan = plan_sequence(grids, tokens, counts)
    assert sum(plan.visible) <= tokens
    assert [counts(kept) for kept in plan.kept] == list(zip(plan.visible, plan.decoded, strict=True))
    whole = [grid.tokens for grid in grids]
    assert all(grid.positions <= kept <= size for grid, kept, size in zip(grids, plan.kept, whole, strict=True))
    if sum(counts(size)[0] for size in whole) <= tokens:
        assert list(plan.kept) == whole
        return
    # All clips above one slot's tokens have the share of the quota, rounded down; one token more of each is too much.
    shares = [
        (kept / size, (kept + 1) / size)
        for kept, size, grid in zip(plan.kept, whole, grids, strict=True)
        if kept > grid.positions
    ]
    if shares:
        assert max(low for low, _ in shares) < min(high for _, high in shares)
    more = [min(kept + 1, size) for kept, size in zip(plan.kept, whole, strict=True)]
    assert sum(counts(kept + math.ceil(1 / (1 - ratio)))[0] for kept in more) > tokens


def test_a_sequence_that_cannot_hold_one_slot_of_each_clip_is_refused_and_one_place_more_is_not():
    packing = Packing(SIZING, group=4, tokens=4 * 196 - 1)
    with pytest.raises(Refused, match=r"data.packing.tokens: 783 places .* 4 clips, since data.clip.size 224"):
        packing.validate()
    dataclasses.replace(packing, tokens=4 * 196).validate()
    masks = Masks(counts_of(0.75), NO_MASKS.draw)
    dataclasses.replace(packing, tokens=4 * 49, masks=masks).validate()


def test_a_clip_alone_drops_nothing_however_large_it_is():
    alone = Packing(SIZING, group=4, tokens=196, masks=Masks(counts_of(0.9, 0.5), NO_MASKS.draw)).of_one_clip()
    assert (alone.group, alone.tokens, alone.decoded) == (1, 8 * 196 - 1411, 705)
    grid = ClipGrid(8, 14, 14)
    assert alone.plan([grid]).kept == (grid.tokens,)


@pytest.mark.parametrize(
    ("packing", "message"),
    [
        (PackingConfig(group=3), "data.packing.group: 3 clips in a sequence do not divide data.micro_batch 8; use "),
        (PackingConfig(group=0), "data.packing.group, data.packing.tokens: must be at least 1"),
        (PackingConfig(aspect=0.5), "data.packing.aspect: 0.5 must be at least 1"),
        (PackingConfig(aspect=float("inf")), "data.packing.aspect: inf must be"),
    ],
)
def test_packing_that_cannot_be_is_refused(packing, message):
    with pytest.raises(Refused) as refused:
        packing.validate(micro_batch=8)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (ClipConfig(frames=15, stride=1), "data.clip.frames: 15 frames do not divide into tubelets of 2"),
        (ClipConfig(frames=16, stride=1, size=12), "data.clip.size: 12 pixels are less than a tubelet of 16 x 16"),
    ],
)
def test_clips_that_tubelets_cannot_make_up_are_refused(clip, message):
    with pytest.raises(Refused, match=message):
        dataclasses.replace(SIZING, clip=clip).validate()


def test_without_masks_every_kept_token_is_visible_in_order():
    visible, decoded = NO_MASKS.draw(5, 1, 2)
    np.testing.assert_array_equal(visible, np.arange(5))
    assert len(decoded) == 0
