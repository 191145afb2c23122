"""Reconstruction pictures: nothing hidden leaks into them, and what is visible comes through."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.pictures import FRAMES_SHOWN, filmstrip, frame_sheet, paint, visible_pixels


@st.composite
def painted_clips(draw):
    """A random clip with a random mask and prediction: the arguments of `paint`."""
    tubelet = tuple(draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))))
    grid = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    clip = random.integers(0, 256, (*np.multiply(grid, tubelet), 3), dtype=np.uint8)
    tokens = random.permutation(np.prod(grid))
    first = draw(st.integers(0, len(tokens)))
    last = draw(st.integers(first, len(tokens)))
    prediction = 3 * random.standard_normal((last - first, 3 * np.prod(tubelet)))
    return clip, tokens[:first], tokens[first:last], prediction, tubelet


@settings(max_examples=100, deadline=None)
@given(painted_clips(), st.integers(0, 2**32))
def test_hidden_pixels_never_change_the_painting_and_visible_ones_come_through(arguments, seed):
    clip, visible, masked, prediction, tubelet = arguments
    shown = visible_pixels(visible, clip.shape, tubelet)
    painting = paint(*arguments)
    other = np.random.default_rng(seed).integers(0, 256, clip.shape, dtype=np.uint8)
    other[shown] = clip[shown]
    assert np.array_equal(painting, paint(other, visible, masked, prediction, tubelet))
    assert np.array_equal(painting[shown], clip[shown])
    assert (painting.dtype, painting.shape) == (clip.dtype, clip.shape)


@settings(max_examples=50, deadline=None)
@given(painted_clips())
def test_tokens_neither_visible_nor_predicted_are_grey(arguments):
    clip, visible, masked, _, tubelet = arguments
    others = ~visible_pixels(np.concatenate([visible, masked]), clip.shape, tubelet)
    assert (paint(*arguments)[others] == 128).all()


def test_token_numbers_run_over_columns_then_rows_then_slots():
    shown = visible_pixels(np.array([0, 5, 11]), (4, 4, 6, 3), (2, 2, 2))  # a grid of 2 slots, 2 rows, 3 columns
    expected = np.zeros((4, 4, 6), dtype=bool)
    expected[0:2, 0:2, 0:2] = expected[0:2, 2:4, 4:6] = expected[2:4, 2:4, 4:6] = True
    assert np.array_equal(shown, expected)


def test_a_perfect_prediction_of_a_clip_with_one_palette_is_the_clip_itself():
    """Where all tubelets have the same mean and deviation, statistics from elsewhere are the right ones."""
    tubelet = (2, 4, 4)
    random = np.random.default_rng(0)
    block = random.integers(40, 200, (32, 3))
    grid = (2, 3, 3)
    tubelets = np.stack([random.permutation(block) for _ in range(18)]).astype(np.uint8)
    clip = tubelets.reshape(*grid, *tubelet, 3).transpose(0, 3, 1, 4, 2, 5, 6).reshape(4, 12, 12, 3)
    masked = np.arange(0, 18, 2)
    normalised = (tubelets - tubelets.mean(axis=1, keepdims=True)) / tubelets.std(axis=1, keepdims=True)
    painting = paint(clip, np.arange(1, 18, 2), masked, normalised.reshape(18, -1)[masked], tubelet)
    assert np.array_equal(painting, clip)


def test_brightness_of_a_masked_tubelet_is_nearest_to_that_of_its_nearest_visible_one():
    clip = np.zeros((1, 1, 8, 3), dtype=np.uint8)
    clip[..., 7, :] = 200
    painting = paint(clip, np.array([0, 7]), np.arange(1, 7), np.zeros((6, 3)), (1, 1, 1))[0, 0, :, 0].astype(int)
    assert list(painting) == sorted(painting)
    assert painting[1] < 5
    assert painting[6] > 195


def test_predictions_that_are_not_numbers_or_out_of_range_are_painted_as_colors():
    prediction = np.array([[np.nan, np.inf, -np.inf], [9.0, -9.0, 0.0]])
    clip = np.array([[[[100, 100, 100], [140, 140, 140]], [[0, 0, 0], [0, 0, 0]]]], dtype=np.uint8)
    painting = paint(clip, np.array([0]), np.array([1]), prediction.reshape(1, 6), (1, 1, 2))
    assert painting[0, 1].tolist() == [[120, 255, 0], [255, 0, 120]]


def test_a_model_with_plain_targets_predicts_the_pixels_themselves():
    clip = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    masked = np.arange(1, 8)
    pixels = clip.reshape(2, 2, 2, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, 12) / 255
    painting = paint(clip, np.array([0]), masked, pixels[masked], (1, 2, 2), targets="pixels")
    assert np.array_equal(painting, clip)
    assert not np.array_equal(paint(clip, np.array([0]), masked, pixels[masked], (1, 2, 2)), clip)


def test_a_clip_that_tubelets_do_not_tile_is_refused():
    with pytest.raises(ValueError, match="do not tile"):
        visible_pixels(np.array([0]), (4, 5, 4, 3), (2, 2, 2))


def test_a_filmstrip_enlarges_small_frames_without_smoothing_and_hides_what_the_encoder_did_not_see():
    random = np.random.default_rng(0)
    clip, painting = random.integers(0, 256, (2, 4, 48, 48, 3), dtype=np.uint8)
    shown = visible_pixels(np.array([0]), clip.shape, (2, 24, 24))
    strip = filmstrip(clip, shown, painting)
    assert strip.size == (4 * (3 * 48 + 4) - 4, 3 * (3 * 48 + 12) - 12)
    rows = [np.asarray(strip)[top : top + 144 : 3, 0:144:3] for top in (0, 156, 312)]
    assert np.array_equal(rows[0][..., :3], clip[0])
    assert np.array_equal(rows[2][..., :3], painting[0])
    assert np.array_equal(rows[1][:24, :24, :3], clip[0, :24, :24])
    assert len(np.unique(rows[1][24:].reshape(-1, 4), axis=0)) == 1
    assert np.array_equal(np.asarray(strip)[0:144:3, 0], np.asarray(strip)[2:144:3, 2])


@pytest.mark.parametrize(("frames", "side", "columns"), [(1, 16, 1), (16, 224, 16), (64, 32, FRAMES_SHOWN)])
def test_a_filmstrip_of_any_clip_has_at_most_sixteen_frames_of_a_size_to_see(frames, side, columns):
    clip = np.zeros((frames, side, side, 3), dtype=np.uint8)
    strip = filmstrip(clip, np.ones(clip.shape[:3], dtype=bool), clip)
    assert isinstance(strip, Image.Image)
    assert 100 <= (strip.width + 4) / columns - 4 <= 192


@pytest.mark.parametrize(("frames", "columns", "rows"), [(1, 1, 1), (3, 3, 1), (8, 4, 2), (64, 4, 2)])
def test_a_sheet_shows_first_and_last_frame_and_at_most_eight_in_two_rows(frames, columns, rows):
    clip = np.repeat(np.arange(frames, dtype=np.uint8), 32 * 32 * 3).reshape(frames, 32, 32, 3)
    sheet = frame_sheet(clip)
    assert sheet.size == (columns * 132 - 4, rows * 132 - 4)
    assert sheet.getpixel((0, 0)) == (0, 0, 0)
    assert sheet.getpixel((sheet.width - 1, sheet.height - 1)) == (frames - 1,) * 3
