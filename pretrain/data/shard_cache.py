"""The cache of a node for files from URLs: whole files only, bounded, shared by all processes without a server.

    NAME        a file, whole: it was written aside, synced and renamed
    NAME.part   a file while one process writes it; see `part_files.py`
    lock        held while room is made and while a part is renamed, so that the bound holds whoever else writes

A part takes all its room on the disk before its first byte comes, so the sizes of the files in the folder tell what is
taken, and a full disk shows early. Files go in the order of their last use; one that is being read stays readable.
"""

import contextlib
import dataclasses
import errno
import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pretrain.data.part_files import Busy, allocate, is_at, locked, locked_part, remove_if_abandoned
from pretrain.errors import DiskFull, Refused
from pretrain.files import is_out_of_space, sync_file

PART = ".part"
LOCK = "lock"
OURS = re.compile(r"[0-9a-f]{40}\.\w+(\.part)?")
"""Names of the cache's files; any other file in the folder is left alone."""
WAIT_FOR_ROOM_S = 0.1
GB = 10**9


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Where shards from URLs are kept on each node; shards in folders are read where they lie."""

    folder: str | None = None
    """Folder on a disk of the node, for all its processes; by default tubelet-UID in $TMPDIR, else ~/.cache/tubelet."""
    max_gb: float = 100
    """Size that the folder never exceeds, in 10^9 bytes; what was used longest ago makes room."""
    prefetch_shards: int = 8
    """Shards that a training process downloads before they are needed; 0 downloads what is needed, when it is."""

    def validate(self, field: str = "data.cache") -> None:
        """Raises `Refused` for a folder or numbers that cannot be."""
        if self.folder is not None and not self.folder.strip():
            raise Refused(f"{field}.folder: is empty; name a folder on a disk of the node, or leave it out")
        if not 0 < self.max_gb < math.inf:
            raise Refused(f"{field}.max_gb: {self.max_gb} must be finite and greater than 0")
        if self.prefetch_shards < 0:
            raise Refused(f"{field}.prefetch_shards: {self.prefetch_shards} must not be negative")

    @property
    def path(self) -> Path:
        """The folder, wherever it is by default; raises `Refused` if that is the home of a user who has none."""
        try:
            if self.folder is not None:
                return Path(self.folder).expanduser().absolute()
            if os.environ.get("TMPDIR"):
                return Path(os.environ["TMPDIR"]).absolute() / f"tubelet-{os.getuid()}"
            return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "tubelet"
        except RuntimeError:
            raise Refused(
                "data.cache.folder: this user has no home folder to keep shards in; give a folder on a disk of the node"
            ) from None

    @property
    def max_bytes(self) -> int:
        """The bound in bytes."""
        return int(self.max_gb * GB)


class Part:
    """A file of the cache while it is written, under its lock."""

    def __init__(self, cache: "ShardCache", path: Path, descriptor: int, wait: bool) -> None:
        """Takes an open file that is locked; `wait` tells whether `reserve` waits for others."""
        self.path = path
        self.descriptor = descriptor
        self._cache = cache
        self._wait = wait

    def reserve(self, size_bytes: int) -> None:
        """Takes room for all of the file, in the cache and on the disk; to be called before the first byte.

        Raises:
            Refused: The file is larger than the whole cache.
            DiskFull: The disk is full, and nothing is left that could go.
            Busy: Others write so much that the file has no room now, and waiting was not wanted.
        """
        while not self._cache.make_room(self, size_bytes):
            if not self._wait:
                raise Busy
            time.sleep(WAIT_FOR_ROOM_S)

    def start_over(self) -> None:
        """Goes back to the first byte."""
        os.lseek(self.descriptor, 0, os.SEEK_SET)

    def write(self, content: bytes) -> None:
        """Writes what comes next."""
        left = memoryview(content)
        while left:
            left = left[os.write(self.descriptor, left) :]


class _File(NamedTuple):
    """A file of the cache; `used_ns` orders files by their last use."""

    used_ns: int
    size_bytes: int
    path: Path


class ShardCache:
    """The files of one folder, at most so many bytes of them; any number of threads and processes may use it."""

    def __init__(self, config: CacheConfig) -> None:
        """Makes the folder; raises `Refused` where that cannot be."""
        config.validate()
        self.folder = config.path
        self.max_bytes = config.max_bytes
        with self._told():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.folder.stat().st_uid
        if config.folder is None and owner != os.getuid():
            raise Refused(f"{self.folder}: belongs to another user; give a data.cache.folder of your own")

    def open(
        self, name: str, is_whole: Callable[[int], bool], fill: Callable[[Part], None], wait: bool = True
    ) -> tuple[int, bool]:
        """Opens a file of the cache, and has it written first if it is not there; only one process writes it.

        Args:
            name: The file's name, as `cache_name` gives it.
            is_whole: Tells whether the file behind a descriptor is what it should be; one that is not is written anew.
            fill: Writes the file: reserves its room, then writes its bytes.
            wait: Whether to wait for another process that writes it.

        Returns:
            A descriptor, which the caller closes and which outlives the file's removal, and whether the file was there.

        Raises:
            Busy: Waiting was not wanted.
            DiskFull: There is no room for it.
            Refused: The folder cannot be written, or the file is larger than the cache.
        """
        was_swept = False
        with self._told():
            while True:
                try:
                    return self._open(self.folder / name, is_whole, fill, wait)
                except FileNotFoundError:  # somebody emptied the folder while the file was written
                    if was_swept:
                        raise
                    was_swept = True
                except OSError as error:  # some disks give room that they do not have
                    if not is_out_of_space(error) or not self._remove_oldest():
                        raise

    def _open(
        self, path: Path, is_whole: Callable[[int], bool], fill: Callable[[Part], None], wait: bool
    ) -> tuple[int, bool]:
        descriptor = _open_whole(path, is_whole)
        if descriptor is not None:
            return descriptor, True
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # some clusters sweep what lies in /tmp
        part_path = path.with_name(path.name + PART)
        with locked_part(part_path, wait) as written:
            descriptor = _open_whole(path, is_whole)
            if descriptor is None:
                fill(Part(self, part_path, written, wait))
                descriptor = self._finish(written, part_path, path)
            return descriptor, False

    def _finish(self, written: int, part_path: Path, path: Path) -> int:
        """Syncs a part, gives it its name and returns a descriptor to read it."""
        os.fsync(written)
        with contextlib.ExitStack() as closing:
            descriptor = os.open(part_path, os.O_RDONLY | os.O_CLOEXEC)
            closing.callback(os.close, descriptor)
            if not os.path.samestat(os.fstat(descriptor), os.fstat(written)):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))  # what lies there is another's part
            with locked(self.folder / LOCK):  # or who makes room now might find it under neither name
                os.rename(part_path, path)
            sync_file(self.folder)
            closing.pop_all()
        return descriptor

    def remove(self, name: str, descriptor: int) -> None:
        """Removes a file that turned out to be damaged, unless another has taken the place of the one that is open."""
        if is_at(descriptor, self.folder / name):
            (self.folder / name).unlink(missing_ok=True)

    def make_room(self, part: Part, size_bytes: int) -> bool:
        """Removes what was used longest ago until a part fits, and gives it its room.

        Returns:
            Whether it fits; if not, others are writing, and what they finish can go.

        Raises:
            Refused: The file is larger than the whole cache.
            DiskFull: The disk is full, and nothing is left that could go.
        """
        if size_bytes > self.max_bytes:
            raise Refused(
                f"data.cache.max_gb: {self.max_bytes / GB:g} is less than one shard of {size_bytes / GB:.3g} GB; use "
                f"at least the shards that a node reads at a time, lanes of the node x data.shards_per_window"
            )
        with locked(self.folder / LOCK):
            finished, writing_bytes = self._files(part)
            if writing_bytes + size_bytes > self.max_bytes:
                return False  # and nothing goes in vain
            finished.sort(reverse=True)
            taken = sum(file.size_bytes for file in finished) + writing_bytes
            while True:
                if taken + size_bytes <= self.max_bytes and allocate(part.descriptor, size_bytes):
                    return True
                if not finished:
                    break
                oldest = finished.pop()
                oldest.path.unlink(missing_ok=True)
                taken -= oldest.size_bytes
            if writing_bytes:
                return False
        disk = os.statvfs(self.folder)
        free_gb = disk.f_bavail * disk.f_frsize / GB
        raise self._full(
            f"a shard of {size_bytes / GB:.3g} GB does not fit into the {free_gb:.3g} GB that are free, and nothing in "
            f"the cache is left to remove"
        )

    def _remove_oldest(self) -> bool:
        """Removes the file that was used longest ago; returns whether there was one."""
        with locked(self.folder / LOCK):
            finished, _ = self._files()
            if finished:
                min(finished).path.unlink(missing_ok=True)
            return bool(finished)

    def _files(self, own: Part | None = None) -> tuple[list[_File], int]:
        """Returns the files that can go, and the bytes that other processes are writing now."""
        finished = []
        writing_bytes = 0
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            if not OURS.fullmatch(entry.name) or (own and path == own.path):
                continue
            with contextlib.suppress(FileNotFoundError):  # renamed or removed by another process
                state = entry.stat()
                if not entry.name.endswith(PART):
                    finished.append(_File(state.st_mtime_ns, state.st_size, path))
                elif not remove_if_abandoned(path):
                    writing_bytes += state.st_size
        return finished, writing_bytes

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Makes one line of what may go wrong with files of the cache."""
        try:
            yield
        except OSError as error:
            if is_out_of_space(error):
                raise self._full(str(error.strerror)) from None
            raise Refused(
                f"{self.folder}: cannot hold the cache ({error.strerror}); give another data.cache.folder"
            ) from error

    def _full(self, reason: str) -> DiskFull:
        remedy = "free some, or give a data.cache.folder on a larger one"
        return DiskFull(f"{self.folder}: the disk of the cache is full: {reason}; {remedy}")


def cache_name(url: str, checksum: str, suffix: str) -> str:
    """Returns the name of a file in the cache, which its full URL and checksum make its own."""
    return hashlib.sha256(os.fsencode(f"{url}\n{checksum}")).hexdigest()[:40] + suffix


def _open_whole(path: Path, is_whole: Callable[[int], bool]) -> int | None:
    """Opens a finished file and notes its use; removes it where it is not what it should be."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with contextlib.ExitStack() as closing:
        closing.callback(os.close, descriptor)
        if not is_whole(descriptor):
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # a cache that was filled before may lie on a disk that is read only
            os.utime(descriptor)
        closing.pop_all()
    return descriptor
