"""Masks: exact counts, ascending and disjoint, the same for ever, and refused where an encoder cannot take them."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.errors import Refused
from pretrain.model.encoders import ENCODERS
from pretrain.model.masking import FITS, MaskConfig, draw_mask, mask_counts
from pretrain.model.tubelets import Grid

EXAMPLES = settings(max_examples=50, deadline=None)
KEYS = st.integers(0, 2**128 - 1)
GRIDS = st.builds(Grid, st.integers(1, 6), st.integers(1, 8), st.integers(1, 8))
NAMES = st.sampled_from(["tube", "random"])
CONFIGS = st.builds(MaskConfig, NAMES, st.floats(0.05, 0.95), st.floats(0.05, 1))
CLIP = Grid(8, 14, 14)


@EXAMPLES
@given(CONFIGS, GRIDS, KEYS, KEYS)
def test_a_mask_is_two_ascending_disjoint_lists_of_exact_length(config, grid, mask_key, decoder_key):
    visible, masked = draw_mask(config, grid, mask_key, decoder_key)
    assert (len(visible), len(masked)) == mask_counts(config, grid)
    for numbers in (visible, masked):
        assert numbers.dtype == np.int64
        assert np.all(np.diff(numbers) > 0)
        assert np.all((numbers >= 0) & (numbers < grid.tokens))
    assert not set(visible.tolist()) & set(masked.tolist())


@EXAMPLES
@given(NAMES, st.floats(0.05, 0.95), GRIDS, KEYS, KEYS)
def test_without_a_share_to_decode_every_token_is_in_one_of_the_lists(name, ratio, grid, mask_key, decoder_key):
    visible, masked = draw_mask(MaskConfig(name, ratio), grid, mask_key, decoder_key)
    assert sorted([*visible.tolist(), *masked.tolist()]) == list(range(grid.tokens))


@EXAMPLES
@given(st.floats(0.05, 0.95), GRIDS, KEYS)
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
    ],
)
def test_counts_are_those_of_the_papers(config, counts):
    assert mask_counts(config, CLIP) == counts


def test_a_ratio_that_is_no_binary_fraction_loses_no_token():
    assert mask_counts(MaskConfig("random", 0.29), Grid(1, 10, 10)) == (71, 29)
    assert int(0.29 * 100) == 28, "which is what plain rounding down would give"


def test_a_mask_depends_on_its_key_alone():
    config = MaskConfig("tube", 0.5, decoded=0.5)
    first = draw_mask(config, CLIP, 1, 2)
    np.random.default_rng(0).random(10)
    again, other, other_share = (draw_mask(config, CLIP, *keys) for keys in ((1, 2), (3, 2), (1, 4)))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert np.array_equal(first[0], other_share[0]), "the decoder's key decides only what is reconstructed"
    assert not np.array_equal(first[1], other_share[1])


@pytest.mark.parametrize(("name", "share"), [("tube", 0.75), ("random", 0.6)])
def test_every_token_is_hidden_equally_often(name, share):
    grid, draws = Grid(2, 4, 5), 400
    hidden = np.zeros(grid.tokens)
    for key in range(draws):
        hidden[draw_mask(MaskConfig(name, share), grid, key, 0)[1]] += 1
    assert np.all(np.abs(hidden - share * draws) < 5 * (draws * share * (1 - share)) ** 0.5)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("tube", "d4e5ff29c2f80782eea592e230593a1f579189f32a309b37003581a6b7a00021"),
        ("random", "e1c55b6fa8a6c15468c3a3ab631dcc660f25f887e85e8ff3e570bf9204556140"),
    ],
)
def test_masks_never_change_between_versions(name, digest):
    drawn = [draw_mask(MaskConfig(name, 0.75, 0.5), Grid(4, 6, 6), key, key + 1) for key in (0, 2**100, 12345)]
    content = b"".join(numbers.astype("<i8").tobytes() for mask in drawn for numbers in mask)
    assert hashlib.sha256(content).hexdigest() == digest


def test_a_pair_that_does_not_fit_is_refused_with_both_names():
    with pytest.raises(
        Refused, match=r"mask\.name: the factorised_encoder encoder cannot take a random mask; use tube"
    ):
        MaskConfig("random").validate("factorised_encoder", CLIP)
    for encoder, names in FITS.items():
        for name in names:
            MaskConfig(name).validate(encoder, CLIP)


def test_every_encoder_has_masks_that_fit():
    assert FITS.keys() == ENCODERS.keys()
    assert all(FITS.values())


@pytest.mark.parametrize(
    ("config", "grid", "message"),
    [
        (MaskConfig(ratio=0.0), CLIP, r"mask\.ratio: 0\.0 must lie between 0 and 1"),
        (MaskConfig(ratio=1.0), CLIP, r"mask\.ratio: 1\.0 must lie between 0 and 1"),
        (MaskConfig(decoded=0.0), CLIP, r"mask\.decoded: 0\.0 must be greater than 0"),
        (MaskConfig(decoded=1.5), CLIP, r"mask\.decoded: 1\.5 must be .* at most 1"),
        (MaskConfig(ratio=0.2), Grid(4, 2, 2), r"mask\.ratio: 0\.2 of 4 x 2 x 2 tokens .* 16 visible and 0 to"),
        (MaskConfig(ratio=0.5, decoded=0.1), Grid(2, 2, 2), r"mask\.decoded: 0\.1 of 4 masked tokens"),
    ],
)
def test_a_mask_that_leaves_nothing_is_refused_by_its_field(config, grid, message):
    with pytest.raises(Refused, match=message):
        config.validate("joint", grid)
