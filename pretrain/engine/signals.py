"""The signals that stop a run, and how what a run starts is kept from them."""

import contextlib
import signal
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Lets processes that are started inside inherit that the signals which stop a run are blocked.

    What starts so lives on when SLURM signals all processes of a job step, unless it takes the signals itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
