"""One job at a time owns a run folder: `run.lock` names the owner and counts the attempts.

A second starter is refused by name. When the owner is gone, or SLURM requeued the very same job, the next attempt takes
over with a higher number; an owner that finds a higher number than its own has lost the run and must not write.
"""

import dataclasses
import json
import os
import socket
from pathlib import Path

import psutil

from pretrain.errors import Refused
from pretrain.files import write_json


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who owns a run.

    Attributes:
        attempt: Counts the starts of the run, from 1.
        host: Host name of rank 0.
        pid: Its process.
        started: When that process started, in seconds since 1970; tells it from a later one with the same number.
        job: SLURM job id, or empty.
        released: Whether the owner ended in order.
    """

    attempt: int
    host: str
    pid: int
    started: float
    job: str
    released: bool = False

    def is_alive(self) -> bool:
        """Whether the owner may still be writing; an owner on another host counts as alive until it released."""
        if self.released:
            return False
        if self.host != socket.gethostname():
            return True
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1.0
        except psutil.NoSuchProcess:
            return False


class RunLock:
    """The ownership of a run folder by this process."""

    def __init__(self, out: Path) -> None:
        """Claims `out`; raises `Refused` if another process owns it."""
        self.path = out / "run.lock"
        previous = _read(self.path)
        job = os.environ.get("SLURM_JOB_ID", "")
        requeued = previous is not None and job != "" and previous.job == job
        if previous is not None and previous.is_alive() and not requeued:
            raise Refused(
                f"{self.path}: process {previous.pid} on {previous.host}"
                f"{f' (job {previous.job})' if previous.job else ''} is writing to this run; wait for it, give another "
                f"--out, or delete the file if that process is gone"
            )
        self.owner = Owner(
            attempt=previous.attempt + 1 if previous else 1,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            job=job,
        )
        write_json(self.path, dataclasses.asdict(self.owner))

    def is_held(self) -> bool:
        """Whether this process still owns the run."""
        return _read(self.path) == self.owner

    def release(self) -> None:
        """Marks the run as free; keeps the count of attempts."""
        if self.is_held():
            write_json(self.path, dataclasses.asdict(dataclasses.replace(self.owner, released=True)))


def _read(path: Path) -> Owner | None:
    if not path.exists():
        return None
    try:
        return Owner(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise Refused(f"{path}: is not a lock that Tubelet wrote; delete it if no run uses this folder") from None
