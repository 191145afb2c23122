"""Whether a video decodes, asked in worker processes: a decoder that hangs or crashes takes its process along."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from pretrain.data.video import open_video

DecodeName = Literal["three", "all", "none"]

FRAMES_AT_ONCE = 16


class DecodedVideo(NamedTuple):
    """What decoding tells of a video: how many frames it holds, and their size in pixels, None if none was decoded."""

    frames: int
    size: tuple[int, int] | None
    """(height, width)"""


@contextlib.contextmanager
def ended_by_stall(stall_s: float) -> Iterator[None]:
    """Lets the kernel end this process when what is inside takes longer than `stall_s` seconds."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, stall_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def decode_video(video: bytes, decode: DecodeName, stall_s: float) -> DecodedVideo:
    """Decodes frames of a video, and ends this process if the decoder makes no progress.

    Args:
        video: The bytes of the file.
        decode: Which frames: the first, middle and last one, all, or none, which only opens the file.
        stall_s: Seconds that opening, or `FRAMES_AT_ONCE` frames, may take.

    Raises:
        BadSample: It cannot be opened, or one of the frames cannot be decoded; the message is the reason alone.
    """
    with ended_by_stall(stall_s):
        reader = open_video(video)
    frames, size = len(reader), None
    for numbers in _numbers(frames, decode):
        with ended_by_stall(stall_s):
            height, width = reader.read(numbers).shape[1:3]
        size = height, width
    return DecodedVideo(frames, size)


def _numbers(frames: int, decode: DecodeName) -> Iterator[np.ndarray]:
    if decode == "three":
        yield np.unique([0, frames // 2, frames - 1])
    elif decode == "all":
        for start in range(0, frames, FRAMES_AT_ONCE):
            yield np.arange(start, min(start + FRAMES_AT_ONCE, frames))
