"""How worker processes start and end: from a fork server, deaf to Ctrl-C, and never later than whom they work for.

Workers must not inherit threads, locks or open decoders, so they are never forked from the process that uses them.
"""

import multiprocessing.connection
import os
import signal
import threading
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext


def fork_server() -> ForkServerContext:
    """Starts the fork server if need be, deaf to Ctrl-C, and returns the context that starts processes from it.

    Ctrl-C reaches every process of the terminal's group. Workers inherit the server's deafness from their very first
    instruction, so only the process that uses them decides what an interruption means. From a thread that is not the
    main one the handler cannot be changed; workers should therefore ignore SIGINT themselves as well.
    """
    if threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, handler)
    return multiprocessing.get_context("forkserver")


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
