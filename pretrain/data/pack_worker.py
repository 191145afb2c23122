"""What a packing process does with one video. Kept apart from `pack.py` so that workers start without torch."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av

from pretrain.data.segments import Segment
from pretrain.data.transcode import Transcoded, duration_of, transcode
from pretrain.errors import reason_of_failure


@dataclasses.dataclass(frozen=True)
class VideoTask:
    """A video to transcode, with the arguments of `transcode`.

    After `stall_s` seconds without progress the kernel ends the process, and with it the video's chances.
    """

    path: Path
    short_side: int
    gop: int
    frame_rate: float | None
    stall_s: float
    segment: Segment | None = None


def transcode_task(task: VideoTask) -> Transcoded | str:
    """Returns the transcoded video, or the reason why there is none.

    Whatever goes wrong with a strange file is its reason.
    """
    with _watchdog(task.stall_s) as watch:
        try:
            return transcode(
                task.path,
                short_side=task.short_side,
                gop=task.gop,
                frame_rate=task.frame_rate,
                segment=task.segment,
                on_progress=watch,
            )
        except Exception as error:
            return reason_of_failure(error)


@dataclasses.dataclass(frozen=True)
class DurationTask:
    """A video whose length is asked for; it may make no progress for `stall_s` seconds."""

    path: Path
    stall_s: float


def duration_task(task: DurationTask) -> Fraction | None:
    """Returns the length of a video in seconds; None if it cannot be told, which packing it will give the reason of."""
    with _watchdog(task.stall_s) as watch:
        try:
            return duration_of(task.path, on_progress=watch)
        except Exception:
            return None


@contextlib.contextmanager
def _watchdog(stall_s: float) -> Iterator[Callable[[], object]]:
    """Lets the kernel end this process when the function it yields is not called for `stall_s` seconds."""
    av.logging.set_level(av.logging.PANIC)  # silent, but errors carry the last line of FFmpeg's log
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def watch() -> None:
        signal.setitimer(signal.ITIMER_REAL, stall_s)

    watch()
    try:
        yield watch
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
