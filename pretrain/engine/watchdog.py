"""Hang detection: a rank that makes no step within a limit says where it stands, and the job ends.

When one rank hangs, is stopped, or waits for ever, all others soon wait for it in a collective. So each rank watches
over itself alone: all of them miss the same step, write the stacks of all their threads to `stacks/rank-N.txt` in the
run's folder, and end with exit code 1; a rank that cannot is killed by srun or the launcher. All wait a little between
writing and ending, so that no rank is killed before it has written.

A thread looks at the clock, which works while the main thread waits in C code (a collective, a copy from the device).
C code that hangs and keeps Python's lock stops that thread too; then a timer of `faulthandler`, which needs no lock and
which the thread moves on as long as it runs, writes the stacks and ends the process. Time in which the job is suspended
counts as none.
"""

import contextlib
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NoReturn

from pretrain.errors import EXIT_FAILED

logger = logging.getLogger(__name__)

STACKS = "stacks"
SLOW_STAGES = 4
"""The first step, a checkpoint and a validation may take so many times as long as a step."""
LOOK_EVERY_S = 1.0
LONGEST_TO_WRITE_S = 10.0
"""What lies at most between the stacks of one rank and its end, in which the others write theirs."""


class Watchdog:
    """Ends the process when it is not told often enough that the run goes on.

    Args:
        limit_s: Seconds that a step may take; 0 watches nothing.
        folder: The run's folder.
        rank: This rank.
        on_hang: Called with the reason before the process ends.
    """

    def __init__(self, limit_s: float, folder: Path, rank: int, on_hang: Callable[[str], None]) -> None:
        """Keeps the arguments; nothing is watched yet."""
        self.limit_s = limit_s
        self.to_write_s = min(LONGEST_TO_WRITE_S, limit_s / 4)
        self.path = folder / STACKS / f"rank-{rank}.txt"
        self.on_hang = on_hang
        self._expected = ("", 0.0)

    def expect(self, doing: str, slow: bool = False) -> None:
        """Starts the time anew.

        Args:
            doing: What is done next, for the message.
            slow: Whether it may take `SLOW_STAGES` times as long as a step.
        """
        self._expected = (doing, self.limit_s * (SLOW_STAGES if slow else 1))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches for as long as the context is open."""
        if not self.limit_s:
            yield
            return
        self.expect("the first step", slow=True)
        ended = threading.Event()
        with self._stack_file() as file:
            thread = threading.Thread(target=self._watch, args=(file, ended), name="watchdog", daemon=True)
            thread.start()
            try:
                yield
            finally:
                ended.set()
                thread.join()
                faulthandler.cancel_dump_traceback_later()

    def _watch(self, file: IO[str], ended: threading.Event) -> None:
        look_every_s = min(LOOK_EVERY_S, self.limit_s / 4)
        expected, spent_s = self._expected, 0.0
        while not ended.is_set():
            if expected is not self._expected:
                expected, spent_s = self._expected, 0.0
            doing, allowed_s = expected
            if spent_s >= allowed_s:
                self._end(file, f"{doing} took longer than {allowed_s:g} s")
            faulthandler.dump_traceback_later(allowed_s - spent_s + self.to_write_s, file=file, exit=True)
            before_s = time.monotonic()
            ended.wait(look_every_s)
            # While the job is suspended the clock goes on, and this thread does not.
            spent_s += min(time.monotonic() - before_s, look_every_s)

    def _end(self, file: IO[str], what: str) -> NoReturn:
        faulthandler.dump_traceback_later(2 * self.to_write_s, file=file, exit=True)  # should what follows hang as well
        reason = f"{what} (stopping.hang_limit_s); the stacks of all ranks are in {self.path.parent}"
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {reason}\n")
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
        logger.error("%s", reason)
        with contextlib.suppress(Exception):
            self.on_hang(reason)
        time.sleep(self.to_write_s)
        os._exit(EXIT_FAILED)

    @contextlib.contextmanager
    def _stack_file(self) -> Iterator[IO[str]]:
        """Opens the file beforehand, since the timer cannot, and removes it if it stays empty."""
        with self._opened() as file:
            yield file
        with contextlib.suppress(OSError):
            if not self.path.stat().st_size:
                self.path.unlink()
                self.path.parent.rmdir()

    def _opened(self) -> IO[str]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return open(self.path, "a")
        except OSError as error:
            logger.warning("%s cannot be written (%s); stacks would go to standard error", self.path, error.strerror)
            return open(os.dup(2), "w")
