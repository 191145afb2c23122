"""Which frames, which crop, which size: against plain arithmetic and VideoMAE's own definition of its crop."""

import collections
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2.functional import resize as torchvision_resize

from pretrain.data.clips import (
    ClipConfig,
    cut,
    frame_indices,
    is_mirrored,
    training_box,
    training_frames,
    view_box,
    view_frames,
)
from pretrain.data.randomness import key_for
from pretrain.errors import Refused

EXAMPLES = settings(max_examples=60, deadline=None)
MOMENTS = st.floats(0, 1)
RATES = st.sampled_from([1.0, 7.5, 12.0, 15.0, 23.976, 25.0, 29.97, 30.0, 60.0])


def by_stride(frames: int, stride: int) -> ClipConfig:
    return ClipConfig(frames=frames, stride=stride)


def by_rate(frames: int, frame_rate: float) -> ClipConfig:
    return ClipConfig(frames=frames, frame_rate=frame_rate)


@EXAMPLES
@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 300), MOMENTS)
def test_a_stride_takes_every_so_manieth_frame_wherever_the_time_window_lies(count, stride, stored, moment):
    indices, padded = frame_indices(by_stride(count, stride), stored, 30.0, moment)
    span = (count - 1) * stride
    first = 0 if padded else int(indices[0])
    assert padded == (span > stored - 1)
    assert 0 <= first <= max(stored - 1 - span, 0)
    assert indices.tolist() == [min(first + n * stride, stored - 1) for n in range(count)]


@EXAMPLES
@given(st.integers(1, 20), RATES, RATES, st.integers(1, 300), MOMENTS)
def test_a_frame_rate_takes_the_frame_nearest_to_each_moment(count, wanted, stored_rate, stored, moment):
    indices, padded = frame_indices(by_rate(count, wanted), stored, stored_rate, moment)
    assert len(indices) == count
    assert np.all(np.diff(indices) >= 0)
    assert 0 <= indices[0] <= indices[-1] <= stored - 1
    times = indices[0] + np.arange(count) * (stored_rate / wanted)
    on_time = indices < stored - 1 if padded else np.ones(count, dtype=bool)
    assert np.all(np.abs(indices - times)[on_time] <= 0.5 + 1e-9)
    assert padded == (times[-1] >= stored - 0.5)
    assert indices[0] == 0 or not padded


@EXAMPLES
@given(st.integers(1, 300), MOMENTS)
def test_seven_and_a_half_frames_a_second_are_stride_four_at_thirty(stored, moment):
    rate, stride = (frame_indices(config, stored, 30.0, moment) for config in (by_rate(16, 7.5), by_stride(16, 4)))
    assert (rate[0].tolist(), rate[1]) == (stride[0].tolist(), stride[1])


def test_every_possible_time_window_is_drawn_equally_often():
    starts = [int(frame_indices(by_stride(4, 2), 16, 30.0, moment)[0][0]) for moment in np.arange(1000) / 1000]
    assert collections.Counter(starts) == dict.fromkeys(range(10), 100)
    assert frame_indices(by_stride(4, 2), 16, 30.0, 1.0)[0].tolist() == [9, 11, 13, 15]


def test_a_short_sample_is_read_once_and_its_last_frame_repeated():
    for moment in (0.0, 0.5, 1.0):
        assert frame_indices(by_stride(6, 2), 5, 30.0, moment)[0].tolist() == [0, 2, 4, 4, 4, 4]
        assert frame_indices(by_stride(6, 2), 1, 30.0, moment)[0].tolist() == [0] * 6
    assert frame_indices(by_stride(6, 2), 10, 30.0, 0.0)[1]
    assert not frame_indices(by_stride(6, 2), 11, 30.0, 0.0)[1]


def test_a_clip_faster_than_its_video_shows_frames_twice():
    indices, padded = frame_indices(by_rate(8, 24.0), 10, 12.0, 0.0)
    assert (indices.tolist(), padded) == ([0, 1, 1, 2, 2, 3, 3, 4], False)


def by_segments(frames: int) -> ClipConfig:
    return ClipConfig(frames=frames, sampling="segments")


@EXAMPLES
@given(st.integers(1, 20), st.integers(1, 300), st.integers(0, 2**128 - 1))
def test_a_training_clip_has_one_frame_of_each_of_its_equal_segments(count, stored, key):
    indices, padded = training_frames(by_segments(count), stored, 30.0, key)
    bounds = np.arange(count + 1) * (stored / count)
    assert len(indices) == count
    assert np.all((np.floor(bounds[:-1]) <= indices) & (indices <= np.ceil(bounds[1:] - 1e-9) - (stored >= count)))
    assert 0 <= indices[0] <= indices[-1] <= stored - 1
    assert padded == (stored < count)
    assert training_frames(by_segments(count), stored, 30.0, key)[0].tolist() == indices.tolist()


def test_each_frame_of_a_segment_is_drawn_equally_often_and_each_segment_for_itself():
    drawn = np.stack([training_frames(by_segments(4), 20, 30.0, key_for(number))[0] for number in range(1000)])
    for number, column in enumerate(drawn.T):
        counts = collections.Counter(column.tolist())
        assert counts.keys() == set(range(5 * number, 5 * number + 5))
        assert all(abs(count - 200) < 60 for count in counts.values())
    assert len({tuple(row) for row in drawn.tolist()}) > 400, "of 625"


@EXAMPLES
@given(st.integers(1, 20), st.integers(1, 300))
def test_two_views_of_segments_are_the_two_that_videomae_tests_something_something_with(count, stored):
    tick = stored / float(count)
    both = [int(tick / 2.0 + tick * x) for x in range(count)] + [int(tick * x) for x in range(count)]
    ordered = sorted(both)
    views = view_frames(by_segments(count), stored, 30.0, 2)
    assert np.abs(np.stack(views) - np.stack([ordered[0::2], ordered[1::2]])).max() <= (tick != int(tick))
    if tick == int(tick):
        assert [view.tolist() for view in views] == [ordered[0::2], ordered[1::2]]


def test_views_are_spread_evenly_and_a_single_one_is_the_middle():
    assert [view.tolist() for view in view_frames(by_segments(3), 12, 30.0, 1)] == [[2, 6, 10]]
    found = [view.tolist() for view in view_frames(by_segments(3), 12, 30.0, 4)]
    assert found == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert [view.tolist() for view in view_frames(by_segments(4), 2, 30.0, 2)] == [[0, 0, 1, 1]] * 2
    assert [view.tolist() for view in view_frames(by_stride(2, 1), 10, 30.0, 3)] == [[0, 1], [4, 5], [8, 9]]
    assert [view.tolist() for view in view_frames(by_stride(2, 1), 10, 30.0, 1)] == [[4, 5]]


def videomae_crops(size: int, height: int, width: int) -> collections.Counter:
    """How often VideoMAE's GroupMultiScaleCrop([1, .875, .75, .66]) draws each (top, left, height, width), of 130."""
    sides = [int(min(height, width) * scale) for scale in (1, 0.875, 0.75, 0.66)]
    sides = [size if abs(side - size) < 3 else side for side in sides]
    crops: collections.Counter = collections.Counter()
    for i, h in enumerate(sides):
        for j, w in enumerate(sides):
            if abs(i - j) <= 1:
                down, right = (height - h) // 4, (width - w) // 4
                offsets = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2)]
                offsets += [(0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]
                crops.update((n * down, m * right, h, w) for m, n in offsets)
    return crops


@pytest.mark.parametrize(("height", "width"), [(256, 340), (340, 256), (226, 300)])
def test_the_multi_scale_crop_is_drawn_as_often_as_in_videomae(height, width):
    config, draws = ClipConfig(size=224), 6500
    drawn = collections.Counter(training_box(config, height, width, key_for(number)) for number in range(draws))
    expected = videomae_crops(224, height, width)
    assert drawn.keys() == expected.keys()
    for box, count in expected.items():
        mean = draws * count / expected.total()
        assert abs(drawn[box] - mean) < 5 * mean**0.5, box


def test_a_side_close_to_the_clips_size_is_cut_without_resampling():
    config = ClipConfig(size=224)
    sides = {training_box(config, 258, 400, key_for(number))[2] for number in range(300)}
    assert sides == {258, 224, 193, 170}, "int(258 * 0.875) is 225"


@EXAMPLES
@given(
    st.sampled_from(["multi_scale", "random_resized", "center"]),
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(1, 300),
    st.integers(0, 2**128 - 1),
)
def test_a_crop_lies_inside_the_frame_whatever_its_size(crop, height, width, size, key):
    top, left, rows, columns = training_box(ClipConfig(crop=crop, size=size), height, width, key)
    assert min(top, left) >= 0
    assert min(rows, columns) >= 1
    assert top + rows <= height
    assert left + columns <= width


@pytest.mark.parametrize("size", [224, 223, 112])
def test_a_frame_just_smaller_than_the_clip_is_never_overrun(size):
    for side in range(size - 4, size + 1):
        for number in range(40):
            top, left, rows, columns = training_box(ClipConfig(size=size), side, side + 7, key_for(number))
            assert min(top, left) >= 0
            assert top + rows <= side
            assert left + columns <= side + 7


def test_the_random_resized_crop_keeps_its_share_and_shape_and_leaves_the_global_generator_alone():
    config = ClipConfig(crop="random_resized", scale=(0.3, 0.6), ratio=(0.8, 1.25))
    before = torch.get_rng_state()
    boxes = [training_box(config, 240, 320, key_for(number)) for number in range(200)]
    assert torch.equal(torch.get_rng_state(), before)
    for _, _, rows, columns in boxes:
        assert 0.29 < rows * columns / (240 * 320) < 0.61
        assert 0.78 < columns / rows < 1.28
    assert len(set(boxes)) > 190
    assert training_box(config, 240, 320, key_for(0)) == boxes[0]


def test_the_centre_crop_is_the_single_view():
    assert training_box(ClipConfig(crop="center"), 240, 320, 5) == view_box(240, 320, 0, 1) == (0, 40, 240, 240)


def test_views_run_from_one_end_of_the_longer_side_to_the_other():
    assert [view_box(48, 100, view, 3) for view in range(3)] == [(0, 0, 48, 48), (0, 26, 48, 48), (0, 52, 48, 48)]
    assert [view_box(100, 48, view, 2) for view in range(2)] == [(0, 0, 48, 48), (52, 0, 48, 48)]


@EXAMPLES
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 6), st.data())
def test_a_view_is_a_square_inside_the_frame(height, width, views, data):
    top, left, rows, columns = view_box(height, width, data.draw(st.integers(0, views - 1)), views)
    assert rows == columns == min(height, width)
    assert 0 <= top <= height - rows
    assert 0 <= left <= width - columns


def frames_of(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_crop_of_the_clips_size_is_copied_byte_by_byte():
    frames = frames_of(40, 60)
    clip = cut(frames, (4, 7, 32, 32), 32)
    assert torch.equal(clip, frames[:, 4:36, 7:39])
    assert clip.is_contiguous()
    assert torch.equal(cut(frames, (4, 7, 32, 32), 32, mirror=True), clip.flip(2))


def test_a_resized_clip_stays_bytes_and_is_antialiased():
    stripes = (torch.arange(64) % 4 == 0) * 255
    frames = stripes.to(torch.uint8).view(1, 1, 64, 1).expand(2, 64, -1, 3)
    clip = cut(frames, (0, 0, 64, 64), 16)
    assert (clip.dtype, clip.shape, clip.is_contiguous()) == (torch.uint8, (2, 16, 16, 3), True)
    assert 40 < clip.min() <= clip.max() < 90, "without antialiasing the stripes would fall between the samples"
    larger = cut(frames_of(20, 20), (2, 3, 10, 14), 32)
    assert (larger.dtype, larger.shape) == (torch.uint8, (3, 32, 32, 3))


def test_a_resized_clip_holds_the_bits_that_torchvision_gives():
    frames = torch.randint(0, 256, (3, 60, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for top, left, height, width in ((0, 10, 60, 60), (4, 7, 32, 60), (20, 3, 25, 17)):
        cropped = frames[:, top : top + height, left : left + width].permute(0, 3, 1, 2)
        expected = torchvision_resize(cropped, [32, 32], antialias=True).permute(0, 2, 3, 1)
        for mirror in (False, True):
            clip = cut(frames, (top, left, height, width), 32, mirror)
            assert torch.equal(clip, expected.flip(2) if mirror else expected)


def test_mirroring_takes_half_of_the_clips_and_none_unless_asked():
    mirrored = sum(is_mirrored(ClipConfig(flip=True), key_for(number)) for number in range(1000))
    assert 430 < mirrored < 570
    assert not any(is_mirrored(ClipConfig(flip=False), key_for(number)) for number in range(50))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of frame_rate and stride"),
        ({"frame_rate": 7.5, "stride": 4}, "exactly one of frame_rate and stride"),
        *(
            ({"sampling": "segments", name: 2}, r"data\.clip\.sampling: segments .* to null, or")
            for name in ("frame_rate", "stride")
        ),
        ({"stride": 4, "frames": 0}, r"data\.clip\.frames"),
        ({"stride": 4, "size": 0}, r"data\.clip\.size"),
        ({"stride": 0}, r"data\.clip\.stride must be finite and greater than 0"),
        *(
            ({"frame_rate": rate}, r"data\.clip\.frame_rate .* must be finite")
            for rate in (0.0, -1.0, math.inf, math.nan)
        ),
        ({"stride": 4, "scale": (0.0, 1.0)}, r"data\.clip\.scale"),
        ({"stride": 4, "scale": (0.6, 0.5)}, r"data\.clip\.scale"),
        ({"stride": 4, "scale": (math.nan, 1.0)}, r"data\.clip\.scale"),
        ({"stride": 4, "ratio": (1.5, 1.0)}, r"data\.clip\.ratio"),
        ({"stride": 4, "ratio": (1.5, math.inf)}, r"data\.clip\.ratio"),
        ({"stride": 4, "mean": (0.5, math.nan, 0.5)}, r"data\.clip\.mean"),
        *(({"stride": 4, "std": (0.2, value, 0.2)}, r"data\.clip\.std") for value in (0.0, -0.2, math.inf, math.nan)),
    ],
)
def test_a_clip_that_cannot_be_cut_is_refused_by_its_field(fields, message):
    with pytest.raises(Refused, match=message):
        ClipConfig(**fields).validate()
    ClipConfig(stride=4).validate()
    ClipConfig(sampling="segments").validate()
    ClipConfig(frame_rate=7.5).validate()
