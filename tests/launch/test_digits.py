"""The demo's videos show what their label says, and only their motion tells it."""

import numpy as np
import pytest

from launch.digits import FRAME_RATE, FRAMES, MOTIONS, SIZE, SPEED, Split, draw_frames, write_videos
from pretrain.data.video import open_video


def shift_between_frames(frames: np.ndarray) -> tuple[int, int]:
    """The shift from a frame to the next, around the picture's edges, that fits best: the peak of the correlation."""
    grey = frames.astype(float).mean(-1)
    moving = grey - grey.mean((1, 2), keepdims=True) - grey.mean(0)  # without the light and without what stands still
    spectra = np.fft.fft2(moving)
    correlation = np.fft.ifft2((spectra[1:] * np.conj(spectra[:-1])).sum(0)).real
    down, right = np.unravel_index(correlation.argmax(), correlation.shape)
    return tuple(int((part + SIZE // 2) % SIZE - SIZE // 2) for part in (down, right))


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_digits_drift_the_way_their_label_says(motion):
    for key in range(5):
        assert shift_between_frames(draw_frames(motion, key)) == tuple(SPEED * part for part in MOTIONS[motion])


def test_the_first_frame_is_the_same_whatever_the_motion():
    first_frames = [draw_frames(motion, key=7)[0] for motion in MOTIONS]
    assert all((frame == first_frames[0]).all() for frame in first_frames)


def test_frames_are_a_function_of_the_key():
    assert (draw_frames("left", 1) == draw_frames("left", 1)).all()
    assert (draw_frames("left", 1) != draw_frames("left", 2)).any()


def test_videos_are_real_and_lie_in_the_folders_of_their_labels(tmp_path):
    write_videos([Split(tmp_path / "a", "a", 9, True), Split(tmp_path / "b", "b", 2, False)], seed=0, jobs=1)
    assert sorted(path.parent.name for path in tmp_path.glob("a/*/*.mp4")) == sorted(
        [*MOTIONS, *MOTIONS, next(iter(MOTIONS))]
    )
    assert len(list(tmp_path.glob("b/*.mp4"))) == 2
    reader = open_video((tmp_path / "b" / "00000.mp4").read_bytes())
    assert len(reader) == FRAMES
    assert reader.read(np.array([0])).shape == (1, SIZE, SIZE, 3)
    assert FRAME_RATE > 0
