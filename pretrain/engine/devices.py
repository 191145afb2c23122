"""What a rank computes on, and where the ranks first meet to tell each other.

A process group is made for one kind of device. Where one node has lost its GPUs, its ranks would wait in a group over
gloo for others that wait in one over NCCL, half an hour long and without a word. So before there is a group, each rank
writes into the launcher's key-value store what it computes on, and all end together where that does not fit.
"""

import contextlib
import datetime
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import psutil
import torch
import torch.distributed
from torch.distributed.rendezvous import rendezvous

from pretrain.errors import Refused, TubeletError

Precision = Literal["fp32", "bf16", "fp16"]

MEET_WITHIN_S = 1800.0
"""How long a run waits for its ranks to start, as torch does."""
READ_WITHIN_S = 10.0
MOST_HOSTS = 3
"""How many hosts an error names."""
ALL_GPUS = "let each process see all GPUs of its node (no --gpus-per-task, no --gpu-bind), and start one for each GPU"
NETWORK = (
    "see that the nodes reach each other on all ports, and name the network interface that joins them in "
    "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO tells more"
)
"""What to do where the ranks cannot talk to each other."""
NO_INTERFACE = ("Unable to find address for", "no socket interface found")
"""What gloo and NCCL say where a variable names an interface that the node lacks."""
FIRST_WITH_BF16 = (8, 0)
"""Compute capability of the first GPUs that compute in bf16 (Ampere); older ones only imitate it."""

_meetings = itertools.count()


class Device(NamedTuple):
    """What a rank computes on.

    Attributes:
        host: The node's name.
        kind: `cuda` or `cpu`.
        name: The GPU's name, or `cpu`.
        problem: Why it cannot do what the run asks for, with the remedy; None if it can.
    """

    host: str
    kind: str
    name: str
    problem: str | None


def host_name() -> str:
    """Returns this node's name: SLURM's where it has one, since that is what its commands take."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Returns where ranks are, such as `node2 (ranks 2, 3) and node3 (rank 4)`; of many hosts, how many more.

    Args:
        ranks: The ranks, ascending.
        hosts: The host of every rank of the run.
    """
    there: dict[str, list[int]] = {}
    for rank in ranks:
        there.setdefault(hosts[rank], []).append(rank)
    named = [f"{host} (rank{'s' * (len(own) > 1)} {_shortened(own)})" for host, own in there.items()]
    more = len(named) - MOST_HOSTS
    if more > 1:
        return f"{', '.join(named[:MOST_HOSTS])} and {more} more hosts"
    return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)


def _shortened(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def device_here(precision: Precision) -> Device:
    """Returns what this rank would compute on, and whether it can do so in `precision`."""
    host, local_rank = host_name(), int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        problem = "precision: fp16 needs a GPU; use bf16 or fp32" if precision == "fp16" else None
        return Device(host, "cpu", "cpu", problem)
    if local_rank >= gpus:
        needs = f"this rank is number {local_rank} of its node, which has {gpus} GPUs, counted from 0"
        return Device(host, "cuda", "none", f"gpus: {needs}; {ALL_GPUS}")
    name, problem = torch.cuda.get_device_name(local_rank), None
    capability = torch.cuda.get_device_capability(local_rank)
    if precision == "bf16" and torch.version.hip is None and capability < FIRST_WITH_BF16:
        problem = f"precision: bf16 is more than the GPU can do ({name}); use fp16 or fp32"
    return Device(host, "cuda", name, problem)


def missing_interface() -> str | None:
    """Returns what is wrong where gloo is told to use a network interface that this node lacks, with the remedy.

    gloo would find out when the process group is made, at which other ranks may wait for this one in vain.
    """
    there = psutil.net_if_addrs()
    named = filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(","))
    missing = [name for name in named if name not in there]
    if not missing:
        return None
    return (
        f"network: GLOO_SOCKET_IFNAME names {missing[0]}, which this node lacks (it has {', '.join(sorted(there))}); "
        f"name the interface that joins the nodes"
    )


def refuse_unfit(devices: Sequence[Device]) -> None:
    """Raises `Refused` where a rank's device cannot do what is asked for, or some ranks have GPUs and others not."""
    hosts = [device.host for device in devices]
    for problem in dict.fromkeys(device.problem for device in devices if device.problem):
        unfit = [rank for rank, device in enumerate(devices) if device.problem == problem]
        raise Refused(problem if len(unfit) == len(devices) else f"{places(unfit, hosts)}: {problem}")
    without = [rank for rank, device in enumerate(devices) if device.kind == "cpu"]
    if 0 < len(without) < len(devices):
        raise Refused(
            f"devices: torch sees no GPU on {places(without, hosts)}, but there are on the others; see nvidia-smi "
            f"there, or start without that node"
        )


def agree_on_devices(here: Device, within_s: float | None = None) -> Any:
    """Tells all ranks what each computes on; every rank calls it, before there is a process group.

    Args:
        here: This rank's device.
        within_s: How long to wait for ranks that have not started yet; None is as long as torch waits.

    Returns:
        The store, to be kept until the process group, which uses it as well, has been made.

    Raises:
        Refused: They do not fit; rank 0 tells it for all. Or another program has the port at which the ranks meet.
        TubeletError: Not all ranks came.
    """
    store, rank, world = _meet(MEET_WITHIN_S if within_s is None else within_s)
    prefix = f"tubelet/devices-{next(_meetings)}"
    store.set(f"{prefix}/{rank}", json.dumps(here))
    try:
        told = store.multi_get([f"{prefix}/{other}" for other in range(world)])
        devices = [Device(*json.loads(one)) for one in told]
        refuse_unfit(devices)
    except torch.distributed.DistError as error:
        raise TubeletError(f"the launcher's store: does not answer ({_first_line(error)}); start again") from None
    except Refused as error:
        error.told = True
        store.add(f"{prefix}/read", 1)
        if rank == 0:  # which keeps the store, so it ends last
            _wait_for_readers(store, f"{prefix}/read", world)
        raise
    return store


@contextlib.contextmanager
def network_told() -> Iterator[None]:
    """Raises in one line what gloo, NCCL or torch's store meet on the network inside.

    Raises:
        Refused: A variable names an interface that this node lacks; each node may meet that alone.
        TubeletError: Anything else, such as another node that was lost; starting again may mend it.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in text.lower():
            raise
        reason = re.sub(r"^\[enforce fail at \S+\] [^.]*\. ", "", _first_line(error))
        if "Last error:" in text:  # where NCCL tells what it met
            reason = text.strip().splitlines()[-1]
        kind = Refused if any(words in text for words in NO_INTERFACE) else TubeletError
        raise kind(f"network: {reason.rstrip('.')}; {NETWORK}") from None


def _meet(within_s: float) -> tuple[Any, int, int]:
    """Returns the launcher's store, this rank and how many there are."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        return next(rendezvous("env://", timeout=datetime.timedelta(seconds=within_s)))
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise Refused(
                f"MASTER_PORT: {place} cannot be used (Address already in use); set it to a free one"
            ) from None
        remedy = "set MASTER_ADDR to an address of the first node that the others reach, and let its ports through"
        raise TubeletError(f"MASTER_ADDR: {place} cannot be reached from {host_name()}; {remedy}") from None
    except torch.distributed.DistStoreError as error:
        remedy = "see why the others have not started, and whether they reach this address and port"
        raise TubeletError(f"MASTER_ADDR: not all ranks came to {place}: {_first_line(error)}; {remedy}") from None


def _wait_for_readers(store: Any, key: str, world: int) -> None:
    deadline = time.monotonic() + READ_WITHIN_S
    while store.add(key, 0) < world and time.monotonic() < deadline:
        time.sleep(0.01)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
