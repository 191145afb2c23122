"""One job at a time owns a run folder: `run.lock` names the owner and counts the attempts.

A second starter is refused by name. When the owner is gone, or SLURM requeued the very same job, the next attempt takes
over with a higher number; an owner that finds a higher number than its own has lost the run and must not write.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from pretrain.errors import Refused
from pretrain.files import write_json

NO_FILE_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # some network file systems have none


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who owns a run.

    Attributes:
        attempt: Counts the starts of the run, from 1.
        host: Host name of rank 0.
        pid: Its process.
        started: When that process started, in seconds since 1970; tells it from a later one with the same number.
        job: SLURM job id, or empty.
        restarts: How often SLURM had requeued that job.
        released: Whether the owner ended in order.
    """

    attempt: int
    host: str
    pid: int
    started: float
    job: str
    restarts: int = 0
    released: bool = False

    @classmethod
    def here(cls, attempt: int) -> "Owner":
        """Returns this process as an owner."""
        return cls(
            attempt=attempt,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        )

    def gives_way_to(self, other: "Owner") -> bool:
        """Whether `other`, a process on this host, may take over; an owner on another host is believed to live."""
        if self.released:
            return True
        if self.host == other.host:
            return not self._is_running()
        return bool(self.job) and self.job == other.job and self.restarts < other.restarts

    def _is_running(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class RunLock:
    """The ownership of a run folder by this process."""

    def __init__(self, out: Path) -> None:
        """Claims `out`; raises `Refused` if another process owns it."""
        self.path = out / "run.lock"
        with self._alone():
            previous = _read(self.path)
            self.owner = Owner.here(attempt=previous.attempt + 1 if previous else 1)
            if previous is not None and not previous.gives_way_to(self.owner):
                raise Refused(
                    f"{self.path}: process {previous.pid} on {previous.host}"
                    f"{f' (job {previous.job})' if previous.job else ''} is writing to this run; wait for it, give "
                    f"another --out, or delete the file if that process is gone"
                )
            write_json(self.path, dataclasses.asdict(self.owner))

    def is_held(self) -> bool:
        """Whether this process still owns the run."""
        return _read(self.path) == self.owner

    def release(self) -> None:
        """Marks the run as free; keeps the count of attempts."""
        with self._alone():
            if self.is_held():
                write_json(self.path, dataclasses.asdict(dataclasses.replace(self.owner, released=True)))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other starters out between reading the lock and writing it, where the file system can."""
        with open(self.path.with_name(".run.lock"), "w") as guard:
            try:
                fcntl.flock(guard, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_FILE_LOCKS:
                    raise
            yield


def _read(path: Path) -> Owner | None:
    if not path.exists():
        return None
    try:
        return Owner(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise Refused(f"{path}: is not a lock that Tubelet wrote; delete it if no run uses this folder") from None
