"""CPU time with that of the decode child: what a clip costs on one core, whoever computes it."""

import time

from pretrain.data.decode_client import client_of_thread


def cpu_time_s() -> float:
    """Seconds that this process and this thread's decode child, where there is one, have computed."""
    child = client_of_thread().pid
    # The clock of another process, as clock_getcpuclockid(3) makes it.
    return time.process_time() + (time.clock_gettime(~child << 3 | 2) if child is not None else 0.0)
