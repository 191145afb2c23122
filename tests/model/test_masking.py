"""Masks: exact counts, ascending and disjoint, the same for ever, and refused where an encoder cannot take them."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.errors import Refused
from pretrain.model.masking import MaskConfig, MaskName, draw_mask, mask_counts
from pretrain.model.tubelets import Grid

EXAMPLES = settings(max_examples=50, deadline=None)
KEYS = st.integers(0, 2**128 - 1)
GRIDS = st.builds(Grid, st.integers(1, 6), st.integers(1, 8), st.integers(1, 8))
NAMES = st.sampled_from(MaskName.__args__)
RATIOS = st.floats(0.05, 0.95)
CLIP = Grid(8, 14, 14)


@st.composite
def masks(draw) -> tuple[MaskConfig, Grid]:
    """Any mask and a grid for it; short blocks only where there is more than one slot."""
    grid = draw(GRIDS)
    pattern = draw(st.sampled_from(["random", "running_cell"]))
    config = MaskConfig(draw(NAMES), draw(RATIOS), draw(st.floats(0.05, 1)), pattern)
    if config.name != "block":
        return config, grid
    least, greatest = sorted(draw(st.tuples(*[st.floats(0.1, 10)] * 2)))
    block_slots = draw(st.none() | st.integers(1, grid.slots - 1)) if grid.slots > 1 else None
    blocks = draw(st.integers(1, 4)), draw(RATIOS), (least, greatest), block_slots
    return MaskConfig("block", config.ratio, config.decoded, pattern, *blocks), grid


@EXAMPLES
@given(masks(), KEYS, KEYS)
def test_a_mask_is_two_ascending_disjoint_lists_of_exact_length(mask, mask_key, decoder_key):
    config, grid = mask
    visible, masked = draw_mask(config, grid, mask_key, decoder_key)
    counts = mask_counts(config, grid)
    assert (len(visible), len(masked)) == (counts.visible, counts.decoded)
    for numbers in (visible, masked):
        assert numbers.dtype == np.int64
        assert np.all(np.diff(numbers) > 0)
        assert np.all((numbers >= 0) & (numbers < grid.tokens))
    assert not set(visible.tolist()) & set(masked.tolist())
    if counts.visible_slots is not None:
        assert len(set((visible // grid.positions).tolist())) == (counts.visible_slots if len(visible) else 0)


@EXAMPLES
@given(NAMES, RATIOS, GRIDS, KEYS, KEYS)
def test_without_a_share_to_decode_every_token_is_in_one_of_the_lists(name, ratio, grid, mask_key, decoder_key):
    visible, masked = draw_mask(MaskConfig(name, ratio), grid, mask_key, decoder_key)
    assert sorted([*visible.tolist(), *masked.tolist()]) == list(range(grid.tokens))


@EXAMPLES
@given(masks(), KEYS, KEYS, KEYS)
def test_a_mask_is_a_pure_function_of_its_keys(mask, mask_key, decoder_key, other_key):
    first = draw_mask(*mask, mask_key, decoder_key)
    np.random.default_rng(0).random(10)
    again = draw_mask(*mask, mask_key, decoder_key)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    other_share = draw_mask(*mask, mask_key, other_key)
    assert np.array_equal(first[0], other_share[0]), "the decoder's key decides only what is reconstructed"


@EXAMPLES
@given(RATIOS, GRIDS, KEYS)
def test_a_tube_hides_the_same_positions_in_every_slot(ratio, grid, key):
    visible, _ = draw_mask(MaskConfig("tube", ratio), grid, key, key)
    slots = visible.reshape(grid.slots, -1)
    assert np.array_equal(slots % grid.positions, np.tile(slots[0] % grid.positions, (grid.slots, 1)))
    assert np.array_equal(slots // grid.positions, np.arange(grid.slots)[:, None].repeat(slots.shape[1], 1))


def test_a_random_mask_differs_from_slot_to_slot():
    visible, _ = draw_mask(MaskConfig("random", 0.9), CLIP, 5, 6)
    positions = {slot: frozenset(visible[visible // 196 == slot] % 196) for slot in range(8)}
    assert len(set(positions.values())) == 8


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        (MaskConfig("tube", 0.9), (160, 1408)),  # VideoMAE: int(0.9 * 196) = 176 of the 196 positions
        (MaskConfig("tube", 0.9, decoded=0.5), (160, 704)),
        (MaskConfig("random", 0.9), (157, 1411)),  # int(0.9 * 1568) = 1411 (mae_st rounds the visible down: 156)
        (MaskConfig("tube", 0.75), (392, 1176)),
        (MaskConfig("tube", 0.9, decoded=0.5, decoded_pattern="running_cell"), (160, 704)),
    ],
)
def test_counts_are_those_of_the_papers(config, counts):
    assert mask_counts(config, CLIP)[:2] == counts


def test_a_ratio_that_is_no_binary_fraction_loses_no_token():
    assert mask_counts(MaskConfig("random", 0.29), Grid(1, 10, 10))[:2] == (71, 29)
    assert int(0.29 * 100) == 28, "which is what plain rounding down would give"


@pytest.mark.parametrize("name", [name for name in MaskName.__args__ if name != "causal"])
def test_other_keys_draw_other_masks(name):
    config = MaskConfig(name, 0.5, 0.5)
    first, other, other_share = (draw_mask(config, CLIP, *keys) for keys in ((1, 2), (3, 2), (1, 4)))
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[1], other_share[1])


@pytest.mark.parametrize("decoded", [1.0, 0.5])
@pytest.mark.parametrize("pattern", ["random", "running_cell"])
@pytest.mark.parametrize(("name", "share"), [("tube", 0.75), ("random", 0.6), ("random_per_slot", 0.6), ("frame", 0.5)])
def test_every_token_is_hidden_and_decoded_equally_often(name, share, pattern, decoded):
    grid, draws = Grid(2, 4, 5), 400
    config = MaskConfig(name, share, decoded, pattern)
    counted = np.zeros(grid.tokens)
    for key in range(draws):
        counted[draw_mask(config, grid, key, key + draws)[1]] += 1
    expected = mask_counts(config, grid).decoded / grid.tokens
    assert np.all(np.abs(counted - expected * draws) < 5 * (draws * expected * (1 - expected)) ** 0.5)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("tube", "d4e5ff29c2f80782eea592e230593a1f579189f32a309b37003581a6b7a00021"),
        ("random", "e1c55b6fa8a6c15468c3a3ab631dcc660f25f887e85e8ff3e570bf9204556140"),
    ],
)
def test_masks_never_change_between_versions(name, digest):
    assert digest_of(MaskConfig(name, 0.75, 0.5)) == digest


@pytest.mark.parametrize(
    ("config", "digest"),
    [
        (MaskConfig("random_per_slot", 0.75), "7d0a6fe8d3b598a7e9a51216a57dd0c0dff40a72a093e20e4382ccafba00dcaa"),
        (MaskConfig("frame", 0.75), "941309c72a01ed2581f51ac9150a69102399a9c842696612d77bc02827d80217"),
        (MaskConfig("block", 0.75), "fb7c5e4225a7e67422b5d4dccdb06a029df0cd58e5c05c03068a4eaceff523ca"),
        (
            MaskConfig("block", 0.75, blocks=8, block_area=0.15, block_slots=2),
            "23930d8ec8caa76eb4af386a37f0f9b6390068b6e5cce8bd364692365a65293f",
        ),
        (MaskConfig("causal", 0.75, 0.5), "8e5297c8c649e326a908da224a1f76b31eacd4282169e52634c9994c623397ad"),
        (
            MaskConfig("tube", 0.75, 0.5, "running_cell"),
            "a29b851ca0c2d4ffa042a22b228040f5c91d6432d9c5c207cb454cf23a01d6b5",
        ),
    ],
)
def test_the_other_masks_do_not_change_either(config, digest):
    assert digest_of(config) == digest


def digest_of(config: MaskConfig) -> str:
    drawn = [draw_mask(config, Grid(4, 6, 6), key, key + 1) for key in (0, 2**100, 12345)]
    content = b"".join(numbers.astype("<i8").tobytes() for mask in drawn for numbers in mask)
    return hashlib.sha256(content).hexdigest()


@EXAMPLES
@given(RATIOS, GRIDS, KEYS)
def test_a_random_mask_per_slot_hides_equally_many_tokens_in_each_slot(ratio, grid, key):
    visible, _ = draw_mask(MaskConfig("random_per_slot", ratio), grid, key, key)
    counts = np.bincount(visible // grid.positions, minlength=grid.slots)
    assert np.all(counts == counts[0])


@EXAMPLES
@given(RATIOS, GRIDS, KEYS)
def test_a_frame_mask_hides_whole_slots(ratio, grid, key):
    visible, masked = draw_mask(MaskConfig("frame", ratio), grid, key, key)
    assert not set((visible // grid.positions).tolist()) & set((masked // grid.positions).tolist())


@EXAMPLES
@given(RATIOS, st.floats(0.05, 1), GRIDS, KEYS, KEYS)
def test_a_causal_mask_shows_the_first_slots_and_decodes_the_next_ones_whole(ratio, decoded, grid, key, decoder_key):
    visible, masked = draw_mask(MaskConfig("causal", ratio, decoded), grid, key, decoder_key)
    assert np.array_equal(np.concatenate([visible, masked]), np.arange(len(visible) + len(masked)))
    assert len(visible) % grid.positions == len(masked) % grid.positions == 0


def test_a_causal_mask_can_ask_for_the_next_slot_alone():
    visible, masked = draw_mask(MaskConfig("causal", 0.5, 0.25), CLIP, 1, 2)
    assert set((visible // 196).tolist()) == {0, 1, 2, 3}
    assert set((masked // 196).tolist()) == {4}


def test_pictures_show_all_that_training_decodes_at_any_time():
    config = MaskConfig("tube", 0.5, 0.5, "running_cell")
    visible, masked = draw_mask(config.as_shown(), CLIP, 1, 2)
    assert len(visible) + len(masked) == CLIP.tokens
    assert np.array_equal(visible, draw_mask(config, CLIP, 1, 2)[0])
    causal = MaskConfig("causal", 0.5, 0.25)
    assert causal.as_shown() == causal


@pytest.mark.parametrize(
    ("config", "grid", "message"),
    [
        (MaskConfig(ratio=0.0), CLIP, r"mask\.ratio: 0\.0 must lie between 0 and 1"),
        (MaskConfig(ratio=1.0), CLIP, r"mask\.ratio: 1\.0 must lie between 0 and 1"),
        (MaskConfig(decoded=0.0), CLIP, r"mask\.decoded: 0\.0 must be greater than 0"),
        (MaskConfig(decoded=1.5), CLIP, r"mask\.decoded: 1\.5 must be .* at most 1"),
        (MaskConfig(ratio=0.2), Grid(4, 2, 2), r"mask\.ratio: 0\.2 of 4 x 2 x 2 tokens .* 16 visible and 0 to"),
        (MaskConfig(ratio=0.5, decoded=0.1), Grid(2, 2, 2), r"mask\.decoded: 0\.1 of 4 masked tokens"),
        (MaskConfig("causal", 0.5, 0.2), CLIP, r"mask\.decoded: 0\.2 of 4 masked slots leaves none"),
        (MaskConfig("causal"), Grid(1, 4, 4), r"mask\.name: a causal mask hides whole slots, but data\.clip\.frames"),
        (
            MaskConfig("frame"),
            Grid(1, 4, 4),
            r"mask\.name: a frame mask .* encoder\.tubelet give one slot; use a longer",
        ),
        (MaskConfig("frame", 0.2), Grid(4, 4, 4), r"mask\.ratio: 0\.2 of 4 x 4 x 4 tokens leaves 64 visible and 0 to"),
        (
            MaskConfig("causal", 0.5, 0.5, "running_cell"),
            CLIP,
            r"mask\.decoded_pattern: a causal mask \(mask\.name\) decodes the nearest slots whole",
        ),
        (
            MaskConfig(decoded_pattern="running_cell"),
            CLIP,
            r"mask\.decoded_pattern: a running_cell is a part of .*, but mask\.decoded 1\.0 is all",
        ),
        (
            MaskConfig("random", decoded=0.5, decoded_pattern="running_cell"),
            Grid(4, 1, 14),
            r"mask\.decoded_pattern: .* 2 x 2 positions, but a slot has 1 x 14 by data\.clip\.size and",
        ),
        (MaskConfig("tube", block_slots=2), CLIP, r"mask\.block_slots: a tube mask \(mask\.name\) has no blocks"),
        (
            MaskConfig("random", blocks=3),
            CLIP,
            r"mask\.blocks: a random mask \(mask\.name\) has no blocks; leave it out",
        ),
        (MaskConfig("block", blocks=0), CLIP, r"mask\.blocks: 0 must be at least 1 and at most the 1568"),
        (MaskConfig("block", blocks=10**9), CLIP, r"mask\.blocks: 1000000000 must be .* at most the 1568 tokens"),
        (MaskConfig("block", block_area=1.0), CLIP, r"mask\.block_area: 1\.0 must lie between 0 and 1"),
        (MaskConfig("block", block_aspect=(2.0, 1.0)), CLIP, r"mask\.block_aspect: \[2\.0, 1\.0\] must be two numbers"),
        (MaskConfig("block", block_aspect=(0.0, 1.0)), CLIP, r"mask\.block_aspect: "),
        (MaskConfig("block", block_slots=0), CLIP, r"mask\.block_slots: 0 must be at least 1"),
        (
            MaskConfig("block", block_slots=8),
            CLIP,
            r"mask\.block_slots: 8 must be .* less than the 8 slots that data\.clip\.frames and encoder\.tubelet give",
        ),
    ],
)
def test_a_mask_that_cannot_be_is_refused_by_its_fields(config, grid, message):
    with pytest.raises(Refused, match=message):
        config.validate("joint", grid)
