"""The files of a shard set in a folder: what is missing or changed is told in a sentence, and reads are tried again."""

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pretrain.data.shard_index import INDEX_NAME, ShardEntry
from pretrain.errors import Refused, TubeletError

logger = logging.getLogger(__name__)

RETRY_AFTER_S = (0.5, 2.0, 8.0)
"""Pauses before the further tries of a read that failed: a network file system may be away for a moment."""

Value = TypeVar("Value")


def read_index_file(folder: Path) -> bytes:
    """Returns `index.json` of a folder; raises `Refused` if it is missing or cannot be read."""
    path = folder / INDEX_NAME
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.is_dir():
            raise Refused(f"{folder}: no such folder; make it with `tubelet pack VIDEOS {folder}`") from error
        remedy = (
            "pack the videos with `tubelet pack VIDEOS SHARDS`, run an interrupted `tubelet pack` again to finish, or "
            "index tars that others made with `tubelet index TARS --out SHARDS`"
        )
        raise Refused(f"{folder}: holds no {INDEX_NAME}, so it is not a finished shard set; {remedy}") from error
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def read_shard_index(folder: Path, entry: ShardEntry) -> bytes:
    """Returns the `.idx` of a shard, whose hash is that in `index.json`.

    Raises:
        Refused: It is missing or another file than `index.json` names.
        TubeletError: It cannot be read, not even after a while.
    """
    path = folder / entry.index_name
    content = patiently(path, lambda: _content_of(path))
    if hashlib.sha256(content).hexdigest() != entry.index_sha256:
        raise Refused(f"{path}: not the file that {INDEX_NAME} names (its hash differs); copy the whole folder again")
    return content


def check_files_of(folder: Path, shard: ShardEntry) -> None:
    """Raises `Refused` if a shard or its index is missing, or the shard's size is not the one in `index.json`."""
    for name in (shard.name, shard.index_name):
        if not (folder / name).is_file():
            raise Refused(
                f"{folder / name}: missing, though {INDEX_NAME} names it; copy the whole folder again or repack"
            )
    size_bytes = (folder / shard.name).stat().st_size
    if size_bytes != shard.bytes:
        raise Refused(
            f"{folder / shard.name}: {size_bytes} bytes, but {INDEX_NAME} says {shard.bytes}; "
            "copy the whole folder again or repack"
        )


def patiently(path: Path | str, read: Callable[[], Value]) -> Value:
    """Returns what `read` reads of a file, with further tries after pauses if the disk or the network fails.

    Raises:
        TubeletError: It cannot be read, not even after a while.
    """
    pauses_s = iter(RETRY_AFTER_S)
    while True:
        try:
            return read()
        except OSError as error:
            pause_s = next(pauses_s, None)
            if pause_s is None:
                raise TubeletError(
                    f"{path}: cannot be read ({error.strerror}), not even after {sum(RETRY_AFTER_S):g} s; check the "
                    "disk or network that holds it, then start again"
                ) from error
            logger.warning("%s: cannot be read (%s); trying again in %g s", path, error.strerror, pause_s)
            time.sleep(pause_s)


def _content_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise Refused(f"{path}: missing; copy the whole folder again or repack it") from error
