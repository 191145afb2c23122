"""How worker processes start and end: from a fork server, deaf to signals, and never later than whom they work for.

Workers must not inherit threads, locks or open decoders, so they are never forked from the process that uses them.
Ctrl-C reaches every process of the terminal's group, and SLURM may signal every process of a job step; what that means
is for the process to decide that uses the workers. Ignoring the signals would not do, since torch's workers handle
SIGTERM again. So workers are started with them blocked, and are stopped with SIGKILL.
"""

import contextlib
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess

HELD_BACK = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
"""Signals that a terminal or a scheduler sends to all processes of a run, and that are for the run alone."""


class WorkerProcess(ForkServerProcess):
    """A process that has SIGTERM blocked, so that only SIGKILL stops it."""

    def terminate(self) -> None:
        """Ends the process."""
        self.kill()


class WorkerContext(ForkServerContext):
    """What starts `WorkerProcess`es."""

    Process = WorkerProcess


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Lets processes that are started inside inherit that signals are blocked, from their very first instruction."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def fork_server(modules: Sequence[str] = ()) -> WorkerContext:
    """Starts the fork server if need be, with signals held back, and returns the context that starts workers from it.

    From a thread that is not the main one the handler of Ctrl-C cannot be changed, which libraries in workers may
    unblock; workers should therefore ignore SIGINT themselves as well.

    Args:
        modules: What the server imports when it starts, so that no worker has to. It must bear being forked, as torch
            and numpy do that have computed nothing yet.
    """
    if modules:
        forkserver.set_forkserver_preload(list(modules))
    with signals_held_back():
        resource_tracker.ensure_running()  # which unblocks SIGINT and SIGTERM for whom it has to start it
    with signals_held_back(), _deaf_to_ctrl_c():
        forkserver.ensure_running()
    return WorkerContext()


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def become_worker(ends_with: Connection | int) -> None:
    """Makes this process deaf to Ctrl-C, which its user decides on, and ends it when `ends_with` closes.

    Args:
        ends_with: A connection that nothing is ever sent through, or the sentinel of a process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(ends_with,), daemon=True).start()


def _end_with(handle: Connection | int) -> None:
    multiprocessing.connection.wait([handle])
    os._exit(1)
