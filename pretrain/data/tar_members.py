"""The members of a plain tar, and where its headers are damaged; `tarfile` by itself takes a bad header for the end."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

CHUNK_BYTES = 2**20


def tar_members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar by their headers alone.

    Raises:
        tarfile.ReadError: After the last member that can be found: a header is damaged, or the tar lacks its end.
        OSError: The file cannot be read.
    """
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0 or member.offset < end:  # or else the same headers come round again, for ever
                    raise tarfile.ReadError(f"the header at byte {member.offset} gives a size below zero")
                end = member.offset_data
                yield member
            offset = tar.offset  # type: ignore[attr-defined]
    except (tarfile.TarError, OSError):
        raise
    except Exception as error:  # numbers and texts in damaged headers make tarfile raise what it does not document
        raise tarfile.ReadError(f"a header after byte {end} is damaged: {type(error).__name__}") from error
    _check_end(file, offset)


def _check_end(file: BinaryIO, offset: int) -> None:
    """Raises `tarfile.ReadError` unless zeros, and nothing else, follow from an offset on."""
    file.seek(offset)
    chunk = file.read(tarfile.BLOCKSIZE)
    if not chunk:
        raise tarfile.ReadError("its end is missing")
    if chunk.strip(b"\0"):
        raise tarfile.ReadError(f"the header at byte {offset} is damaged")
    while chunk := file.read(CHUNK_BYTES):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"more follows after its end at byte {offset}")
