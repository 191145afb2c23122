"""What ends a run before its end, in order: SIGUSR2, SIGTERM, SIGUSR1, Ctrl-C, and limits of time.

Each of these is only noted. The trainer sends what was noted to all ranks with the figures that it gathers in every
step anyway, so no rank sends or waits for anything more, and all find the same answer in the same step. They save it
and end together, with exit code 75 (130 after Ctrl-C). Where no steps are taken:

    before the first step       the run ends before it, with the checkpoint that it has, or none
    in a validation             it is abandoned at its next batch; the next attempt makes it first of all
    after the last step         the final pictures or evaluation are abandoned; the next attempt makes them anew

A second signal, `REPEATED_S` after the first or later, means now: the process ends at once with exit code 128 and the
signal's number. It saves nothing and leaves no `outcome.json`; a checkpoint that it was writing is removed by the next
attempt, which goes on from the one before.

Under srun with a task for each rank, every signal reaches the ranks and their exit code is srun's. torchrun, accelerate
and deepspeed pass on SIGTERM and SIGINT alone (deepspeed both as SIGTERM), die of the others, and kill the ranks 30
seconds after: there a step and its checkpoint must fit into 30 seconds. They end with codes of their own, so what the
run says stands in `outcome.json` alone.
"""

import dataclasses
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from pretrain.engine.distributed import Processes
from pretrain.engine.progress import on_terminal
from pretrain.engine.signals import STOP_SIGNALS
from pretrain.errors import Interrupted, Preempted, Refused

logger = logging.getLogger(__name__)

TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGTSTP)
REPEATED_S = 1.0
"""A signal so soon after another is the same one, heard again through the launcher or the process group."""
END_MARGIN_S = 120.0
"""So long before the end of a SLURM job a run stops by itself, or for the last tenth of what is left of a short one."""
TIME_LIMIT, JOB_END = 1001, 1002  # beyond the numbers of signals
SHOW_CURSOR = b"\033[?25h\n"


@dataclasses.dataclass(frozen=True)
class StoppingConfig:
    """When a run ends before its end."""

    time_limit_s: float | None = None
    """Seconds from its opening after which the run saves a checkpoint and ends with exit code 75; None sets no limit.
    Where SLURM tells the end of the job, a run stops two minutes before that in any case."""
    hang_limit_s: float = 1800
    """Seconds without a step after which all ranks write their stacks to the run's `stacks/` and end with exit code 1;
    the first step, a checkpoint and a validation may each take four times as long. 0 sets no limit."""

    def validate(self) -> None:
        """Raises `Refused` for limits that cannot be."""
        if self.time_limit_s is not None and not self.time_limit_s > 0:
            raise Refused(f"stopping.time_limit_s: {self.time_limit_s} must be greater than 0; drop it for no limit")
        if not self.hang_limit_s >= 0:
            raise Refused(f"stopping.hang_limit_s: {self.hang_limit_s} must not be negative; 0 sets no limit")


class Cause(NamedTuple):
    """What ends a run, as all ranks know it.

    Attributes:
        code: A signal's number, `TIME_LIMIT` or `JOB_END`.
        rank: The first rank that met it.
    """

    code: int
    rank: int

    def __str__(self) -> str:
        """Tells it in words."""
        if self.code == TIME_LIMIT:
            return "stopping.time_limit_s is over"
        if self.code == JOB_END:
            return "the job's time is nearly over"
        return f"{signal.Signals(self.code).name} (rank {self.rank})"

    def error(self, saved: str) -> Preempted:
        """Returns what all ranks raise, given where the run stands."""
        if self.code == signal.SIGINT:
            error: Preempted = Interrupted(f"interrupted {saved}; start the same command again to go on")
        else:
            error = Preempted(f"{self}: ended {saved}; start the same command again to go on")
        error.told = True
        return error


def first_cause(codes: Tensor) -> Cause | None:
    """Returns what ends the run, from the `(world,)` codes of all ranks, or None while all of them are 0."""
    ranks = codes.nonzero().flatten().tolist()
    return Cause(int(codes[ranks[0]]), ranks[0]) if ranks else None


class StopRequests:
    """Notes signals and the end of the time; a context manager, which leaves handlers as they were.

    The handlers are C code that writes a signal's number to a pipe. A thread reads it there, so a signal counts at
    once, whatever the main thread waits for. From a thread that is not the main one signals cannot be taken over; then
    only the limits of time count.
    """

    def __init__(self, time_limit_s: float | None = None, environment: Mapping[str, str] = os.environ) -> None:
        """Starts the clocks.

        Args:
            time_limit_s: Seconds from now until the run is to stop, or None.
            environment: Tells when a SLURM job ends.
        """
        self._signal = 0
        self._limit = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._job_end = job_end(environment, time.time())
        self._handlers: dict[int, Any] = {}

    @property
    def code(self) -> int:
        """What this rank has met: a signal's number, `TIME_LIMIT`, `JOB_END`, or 0 for nothing."""
        if self._signal:
            return self._signal
        if self._limit is not None and time.monotonic() >= self._limit:
            return TIME_LIMIT
        return JOB_END if self._job_end is not None and time.time() >= self._job_end else 0

    def agreed(self, processes: Processes) -> Cause | None:
        """Returns what ends the run, if any rank has met something; every rank calls it."""
        return first_cause(processes.gather(torch.tensor([self.code], dtype=torch.float64))[:, 0])

    def abandon_forward(self, model: nn.Module, processes: Processes, where: str) -> Any:
        """Lets the model's forward pass, which all ranks call alike, raise `Preempted` once any rank has met something.

        Returns:
            The hook's handle.
        """

        def check(*_: Any) -> None:
            cause = self.agreed(processes)
            if cause:
                raise cause.error(where)

        return model.register_forward_pre_hook(check)

    def __enter__(self) -> Self:
        """Takes the signals over."""
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, signal.SIGTSTP):
            if number in TERMINAL_SIGNALS and signal.getsignal(number) is signal.SIG_IGN:
                continue  # a background job of a shell script, which the terminal's keys do not mean
            self._handlers[number] = signal.signal(number, _do_nothing)
            signal.siginterrupt(number, False)  # system calls of libraries go on as if nothing had happened
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Gives the signals back."""
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _listen(self) -> None:
        first_s = 0.0
        while numbers := os.read(self._read, 1):
            number = numbers[0]
            if number == signal.SIGTSTP:
                _suspend()
            elif number not in STOP_SIGNALS:
                continue  # another handler's
            elif not self._signal:
                self._signal, first_s = number, time.monotonic()
                name = signal.Signals(number).name
                logger.warning("%s: the run saves and ends as soon as it can; a second signal ends it at once", name)
            elif time.monotonic() - first_s >= REPEATED_S:
                _end_at_once(number)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Python's part of a handler; what counts is the number in the pipe."""


def _suspend() -> None:
    """Stops the process, as Ctrl-Z or the suspension of a job asks for; that time is none to the watchdog."""
    faulthandler.cancel_dump_traceback_later()
    os.kill(os.getpid(), signal.SIGSTOP)


def _end_at_once(number: int) -> None:
    if on_terminal():
        os.write(sys.stderr.fileno(), SHOW_CURSOR)  # the progress bar hides it
    os._exit(128 + number)


def job_end(environment: Mapping[str, str], now_s: float) -> float | None:
    """Returns when a run has to stop so that it is saved before SLURM ends its job, or None outside of SLURM.

    Args:
        environment: Holds `SLURM_JOB_END_TIME`, in seconds since 1970.
        now_s: The time by that clock.
    """
    told = environment.get("SLURM_JOB_END_TIME", "")
    if not told.isdigit():
        return None
    left_s = max(int(told) - now_s, 0)
    return int(told) - min(END_MARGIN_S, left_s / 10)
