"""Whether the ranks can sum a tensor together, and how fast: what training does with every gradient."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed

from pretrain.engine.devices import NETWORK, host_name
from pretrain.engine.distributed import Processes
from pretrain.errors import EXIT_REFUSED, TubeletError

WITHIN_S = 60.0
PAYLOAD_BYTES = {"cuda": 256 << 20, "cpu": 8 << 20}
SMALL_ROUNDS = 20
LARGE_ROUNDS = 3


class AllReduce(NamedTuple):
    """How fast tensors are summed over all ranks.

    Attributes:
        backend: `nccl` or `gloo`.
        latency_s: Seconds for a single number: the median of the slowest rank.
        payload_bytes: Size of the large tensor.
        bytes_per_second: Bus bandwidth with it, 2 (n - 1) / n times its size over the shortest time, as NCCL's tests
            count it: the speed of the slowest link, whatever the number n of ranks.
    """

    backend: str
    latency_s: float
    payload_bytes: int
    bytes_per_second: float


def measure_all_reduce(processes: Processes, within_s: float = WITHIN_S) -> AllReduce:
    """Sums tensors over at least two ranks, on the device; every rank calls it.

    Args:
        processes: All processes.
        within_s: Ends the process, with a line that says so, where no answer comes for so long: NCCL would wait.

    Raises:
        TubeletError: The sum is wrong, or the network failed.
    """
    world, device = processes.world, processes.device
    payload_bytes = PAYLOAD_BYTES[device.type]
    expected = world * (world + 1) / 2
    try:
        with ended_after(within_s, "all-reduce"):
            small = [_timed(torch.full((1,), processes.rank + 1.0, device=device)) for _ in range(SMALL_ROUNDS)]
            large = [
                _timed(torch.full((payload_bytes // 4,), processes.rank + 1.0, device=device))
                for _ in range(LARGE_ROUNDS)
            ]
    except RuntimeError as error:
        raise TubeletError(f"failed ({str(error).strip().splitlines()[0]}); {NETWORK}") from None
    wrong = [total for total, _ in (*small, *large) if not bool((total == expected).all())]
    if wrong:
        raise TubeletError(
            f"the sum of 1 to {world} is {wrong[0].flatten()[0].item()} and not {expected}; a GPU or a link between "
            "GPUs is broken, or the ranks run different libraries: try with fewer nodes to find which"
        )
    own = sorted(seconds for _, seconds in small)[SMALL_ROUNDS // 2], min(seconds for _, seconds in large)
    latency_s, fastest_s = (max(times) for times in zip(*processes.gather_objects(own), strict=True))
    return AllReduce(
        torch.distributed.get_backend(), latency_s, payload_bytes, 2 * (world - 1) / world * payload_bytes / fastest_s
    )


def _timed(tensor: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Sums a tensor over all ranks, in place; returns it with the seconds that this took."""
    _synchronise(tensor)
    started = time.perf_counter()
    torch.distributed.all_reduce(tensor)
    _synchronise(tensor)
    return tensor, time.perf_counter() - started


def _synchronise(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


@contextlib.contextmanager
def ended_after(seconds: float, doing: str, remedy: str = NETWORK) -> Iterator[None]:
    """Ends the process where what is inside takes longer: it may wait in C code, which no exception reaches.

    Args:
        seconds: How long it may take.
        doing: What it does, for the line that is told then.
        remedy: What to do about it.
    """

    def end() -> None:
        print(f"tubelet: {doing}: no answer within {seconds:g} s on {host_name()}; {remedy}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_REFUSED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
