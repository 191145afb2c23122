"""Files that many processes want and one at a time writes aside, under a lock that the death of its holder frees.

The part is its own lock file: whoever holds `flock` on it writes, renames or removes it. A process that waited for the
lock may find the part gone from its place, and then starts again with a new one.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pretrain.files import is_out_of_space


class Busy(Exception):
    """Another process writes the file, or holds the room that it needs; who does not want to wait gets this."""


@contextlib.contextmanager
def locked_part(path: Path, wait: bool) -> Iterator[int]:
    """Yields a descriptor of the file at `path`, empty and locked; what was not renamed is removed afterwards.

    Raises:
        Busy: Another process holds it and waiting was not wanted.
    """
    descriptor = _lock(path, wait)
    try:
        yield descriptor
    finally:
        if is_at(descriptor, path):
            path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file that stays where it is."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_if_abandoned(path: Path) -> bool:
    """Removes a part whose writer is gone; returns False if one is writing it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(descriptor, path):
            path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def allocate(descriptor: int, size_bytes: int) -> bool:
    """Takes room on the disk for an empty file; returns False, and leaves it empty, if there is not enough."""
    if not size_bytes:
        return True
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        return True
    except OSError as error:
        if not is_out_of_space(error):
            raise
        os.ftruncate(descriptor, 0)
        return False


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(path: Path, wait: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise Busy from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
