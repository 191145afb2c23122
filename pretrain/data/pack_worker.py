"""What a packing process does with one video. Kept apart from `pack.py` so that workers start without torch."""

import dataclasses
import signal
from pathlib import Path

import av

from pretrain.data.transcode import Transcoded, transcode
from pretrain.errors import BadSample


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


def transcode_task(task: VideoTask) -> Transcoded | str:
    """Returns the transcoded video, or the reason why there is none.

    One strange file must not end a pack of a million: whatever goes wrong with it is its reason.
    """
    av.logging.set_level(av.logging.PANIC)  # silent, but errors carry the last line of FFmpeg's log
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def watch() -> None:
        signal.setitimer(signal.ITIMER_REAL, task.stall_s)

    watch()
    try:
        return transcode(
            task.path, short_side=task.short_side, gop=task.gop, frame_rate=task.frame_rate, on_progress=watch
        )
    except BadSample as error:
        return str(error)
    except MemoryError:
        return "does not fit in memory"
    except Exception as error:
        return f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
