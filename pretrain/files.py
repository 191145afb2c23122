"""Atomic writes and checksums: a file that Tubelet writes is there whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""What file systems without hard links say to one."""


def sha256_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file as a hexadecimal string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Forces a file, or a folder's list of names, from the page cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success syncs it and renames it over `path`, else removes it.

    An `OSError` that names no file, as that of a write does not, leaves with the name of `path`.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_file(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Writes a UTF-8 text file atomically."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text_once(path: Path, content: str) -> None:
    """Writes a text file unless it is there; of several processes, on any nodes of a shared file system, one does."""
    temporary = path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        temporary.write_text(content)
        sync_file(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            os.replace(temporary, path)
        sync_file(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def append_json_lines(path: Path, entries: list[Any]) -> None:
    """Appends one line of JSON for each entry, in one write."""
    with open(path, "a") as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in entries))


def is_out_of_space(error: OSError) -> bool:
    """Tells whether a write failed for want of space: a full disk, a spent quota, or a file at its size limit."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
