"""The demo's videos show what their label says, and only their motion tells it."""

import numpy as np
import pytest

from launch.digits import FRAME_RATE, FRAMES, MOTIONS, SIZE, Split, draw_frames, write_videos
from pretrain.data.video import open_video


def moving_part(frames: np.ndarray) -> np.ndarray:
    """The digit without its still background: the distance from the median frame."""
    return np.abs(frames.astype(float) - np.median(frames, axis=0)).sum(-1)


def shift_between(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """The shift around the picture's edges that fits best, by the peak of the cross-correlation."""
    peak = np.fft.ifft2(np.fft.fft2(second) * np.conj(np.fft.fft2(first))).real
    down, right = np.unravel_index(peak.argmax(), peak.shape)
    return tuple(int((part + SIZE // 2) % SIZE - SIZE // 2) for part in (down, right))


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_digit_drifts_the_way_its_label_says(motion):
    down, right = MOTIONS[motion]
    for key in range(5):
        part = moving_part(draw_frames(motion, key))
        shifts = [shift_between(part[time], part[time + 4]) for time in (2, 6, 10)]
        median = np.median(shifts, axis=0)
        assert np.sign(np.where(np.abs(median) < 2, 0, median)).tolist() == [np.sign(down), np.sign(right)]


def test_the_first_frame_is_the_same_whatever_the_motion():
    first_frames = [draw_frames(motion, key=7)[0] for motion in MOTIONS]
    assert all((frame == first_frames[0]).all() for frame in first_frames)


def test_frames_are_a_function_of_the_key():
    assert (draw_frames("left", 1) == draw_frames("left", 1)).all()
    assert (draw_frames("left", 1) != draw_frames("left", 2)).any()


def test_videos_are_real_and_lie_in_the_folders_of_their_labels(tmp_path):
    write_videos([Split(tmp_path / "a", "a", 9, True), Split(tmp_path / "b", "b", 2, False)], seed=0, jobs=1)
    assert sorted(path.parent.name for path in tmp_path.glob("a/*/*.mp4")) == sorted([*MOTIONS, next(iter(MOTIONS))])
    assert len(list(tmp_path.glob("b/*.mp4"))) == 2
    reader = open_video((tmp_path / "b" / "00000.mp4").read_bytes())
    assert len(reader) == FRAMES
    assert reader.read(np.array([0])).shape == (1, SIZE, SIZE, 3)
    assert FRAME_RATE > 0
