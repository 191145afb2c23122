"""What a person sees while a run goes on: log lines and progress, all on standard error.

On a terminal, a rich bar that log lines scroll past without tearing; in a file (a SLURM log, a pipe) plain lines that
`grep` and `tail -f` understand. Both show the same figures. Nothing here is a record: that is `tracking.py`.
"""

import logging
import os
import sys
import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)

HOUSE = ("pretrain", "finetune", "launch", "__main__")
UPDATES_PER_ESTIMATE = 100

_console = Console(stderr=True)  # one for bar and log lines, so that rich can keep them apart


def set_up_logging(level: int | str = "INFO", main_process: bool = True) -> None:
    """Sends all log lines to standard error, replacing any handlers of the root logger.

    Args:
        level: The level of Tubelet's own loggers. Other libraries speak from WARNING on, or at DEBUG if this is DEBUG.
        main_process: False on all ranks but 0, which then speak from WARNING on.
    """
    threshold = level if isinstance(level, int) else logging.getLevelNamesMapping()[level.upper()]
    quieter = max(threshold, logging.WARNING)
    handler: logging.Handler
    if on_terminal():
        handler = RichHandler(console=_console, show_path=False, omit_repeated_times=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_PlainFormatter("%(asctime)s %(name)s  %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=threshold if threshold <= logging.DEBUG else quieter, handlers=[handler], force=True)
    for name in HOUSE:
        logging.getLogger(name).setLevel(threshold if main_process else quieter)


class Progress:
    """The progress of a run: a bar on a terminal, else a line every few steps; a context manager."""

    def __init__(self, total_steps: int, start_step: int, description: str, enabled: bool, every: int):
        """Prepares, shows nothing yet.

        Args:
            total_steps: The step at which the run ends.
            start_step: The step from which it goes on, 0 for a new run.
            description: What stands before the bar, such as "pretrain".
            enabled: False on all ranks but 0: then nothing is ever shown.
            every: Steps between plain lines.
        """
        self.total_steps = total_steps
        self.every = max(1, every)
        self._description = description
        self._last_step = start_step
        self._enabled = enabled
        self._timeline = deque([(time.monotonic(), start_step)], maxlen=UPDATES_PER_ESTIMATE)
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        self._timeline[0] = (time.monotonic(), self._last_step)
        if self._enabled and on_terminal():
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[figures]}"),
                console=_console,
                redirect_stdout=False,
            )
            self._task = self._bar.add_task(
                self._description, total=self.total_steps, completed=self._last_step, figures=""
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def update(self, step: int, loss: float, clips_per_second: float) -> None:
        """Shows where the run is.

        Args:
            step: Steps done, at least as many as in the last call.
            loss: The newest loss.
            clips_per_second: Clips that all ranks together train on in a second.
        """
        if not self._enabled:
            return
        self._timeline.append((time.monotonic(), step))
        remaining = duration(remaining_s(self._timeline, self.total_steps))
        figures = f"loss {loss:.4f}  {clips_per_second:.1f} clips/s  {remaining} left"
        if self._bar:
            self._bar.update(self._task, completed=step, figures=figures)
        elif step // self.every > self._last_step // self.every or self._last_step < step == self.total_steps:
            logger.info("step %d/%d  %s", step, self.total_steps, figures)
        self._last_step = step


def on_terminal() -> bool:
    """Returns whether standard error is a terminal that can draw."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def remaining_s(timeline: deque[tuple[float, int]], total_steps: int) -> float | None:
    """Returns the seconds left at the pace of the timeline's (seconds, step) pairs, None when it shows no pace."""
    (start_s, start), (now_s, step) = timeline[0], timeline[-1]
    return (total_steps - step) * (now_s - start_s) / (step - start) if step > start else None


def duration(seconds: float | None) -> str:
    """Returns a duration in its two largest units, such as `45s`, `2m10s`, `3h05m` or `2d04h`; `?` for None."""
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    if hours:
        return f"{hours}h{minute:02d}m"
    return f"{minutes}m{second:02d}s" if minutes else f"{second}s"


class _PlainFormatter(logging.Formatter):
    """One line a fact; what is a warning or worse says so."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        return line if record.levelno < logging.WARNING else line.replace("  ", f"  {record.levelname}: ", 1)
