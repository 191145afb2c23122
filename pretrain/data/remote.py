"""A shard set behind a URL: its index from the server, its shards through the node's cache, every byte checked.

What fails is tried again with growing pauses, for longer than a server takes to come back; a server that sends another
file than `index.json` names is asked once more, past the caches between, and then named.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pretrain.data import transfer
from pretrain.data.part_files import Busy
from pretrain.data.shard_cache import CacheConfig, Part, ShardCache, cache_name
from pretrain.data.shard_index import INDEX_NAME, ShardEntry, parse_json_object
from pretrain.errors import Refused, TubeletError

logger = logging.getLogger(__name__)

RETRY_AFTER_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Pauses before the further tries of a download, each up to a quarter longer, so that nodes do not come all at once."""
LONGER = 0.25

Value = TypeVar("Value")

_jitter = random.Random()  # training seeds the global generator, and must not find it moved


class _WrongContent(Exception):
    """What came, whole, is not what `index.json` names."""


class _Stopped(Exception):
    """Nobody wants the file any more."""


@dataclasses.dataclass(frozen=True)
class RemoteFolder:
    """A folder of shards behind a URL, read through a cache; small enough to be sent to workers.

    Attributes:
        url: Without credentials, which requests take from the user's own files and environment.
        cache: Where its files are kept on this node.
    """

    url: str
    cache: CacheConfig

    def __str__(self) -> str:
        """The URL."""
        return self.url

    def __truediv__(self, name: str) -> str:
        """Returns the URL of a file."""
        return f"{self.url}/{name if self.url.startswith('s3:') else urllib.parse.quote(os.fsencode(name))}"

    def read_index(self) -> bytes:
        """Returns `index.json`, always the server's.

        Raises:
            Refused: There is none, it is not given to us, or it is no JSON object.
            TubeletError: It cannot be fetched, not even after a while.
        """
        url = self / INDEX_NAME

        def attempt(fresh: bool) -> bytes:
            content = _read(url, fresh, None)
            try:
                parse_json_object(content)
            except ValueError as error:
                raise _WrongContent(str(error)) from None
            return content

        return _patiently(url, attempt)

    def read_shard_index(self, entry: ShardEntry) -> bytes:
        """Returns the `.idx` of a shard, whose hash is that in `index.json`.

        Raises:
            Refused: It is missing or another file than `index.json` names.
            TubeletError: It cannot be fetched or kept.
        """
        url = self / entry.index_name

        def attempt(fresh: bool) -> bytes:
            content = _read(url, fresh, None)
            _check_hash(hashlib.sha256(content).hexdigest(), entry.index_sha256)
            return content

        def fill(part: Part) -> None:
            content = _patiently(url, attempt)
            part.reserve(len(content))
            part.write(content)

        def is_whole(descriptor: int) -> bool:
            return hashlib.sha256(_content_of(descriptor)).hexdigest() == entry.index_sha256

        descriptor, _ = _cache(self.cache).open(cache_name(url, entry.index_sha256, ".idx"), is_whole, fill)
        with _closing(descriptor):
            return _content_of(descriptor)

    def open_shard(self, entry: ShardEntry) -> tuple[int, bool]:
        """Opens a shard in the cache, and downloads it first if it is not there.

        Returns:
            A descriptor of the tar, which the caller closes, and whether nobody had to wait for a download.

        Raises:
            Refused: It is missing or another file than `index.json` names, or the cache cannot hold it.
            DiskFull: The disk of the cache is full.
            TubeletError: It cannot be fetched, not even after a while.
        """
        return self._open_shard(entry)

    def fetch_ahead(self, entry: ShardEntry, stopped: threading.Event) -> None:
        """Downloads a shard into the cache, unless it is there, others do so, or `stopped` is set meanwhile.

        One that is there counts as used now, so that those fetched after it do not push it out.

        Raises:
            TubeletError: As `open_shard`.
        """
        with contextlib.suppress(Busy, _Stopped):
            os.close(self._open_shard(entry, stopped)[0])

    def drop_if_damaged(self, entry: ShardEntry) -> bool:
        """Removes a shard from the cache if the disk has changed its bytes; returns whether it had."""
        descriptor, _ = self._open_shard(entry)
        with open(descriptor, "rb") as file:
            damaged = hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256
            if damaged:
                logger.warning("%s: its copy in %s is damaged; fetching it again", self / entry.name, self.cache.path)
                _cache(self.cache).remove(self._name(entry), descriptor)
        return damaged

    def _name(self, entry: ShardEntry) -> str:
        return cache_name(self / entry.name, entry.sha256, ".tar")

    def _open_shard(self, entry: ShardEntry, stopped: threading.Event | None = None) -> tuple[int, bool]:
        url = self / entry.name

        def fill(part: Part) -> None:
            part.reserve(entry.bytes)
            _patiently(url, functools.partial(_download, url, entry, part, stopped), stopped)

        def is_whole(descriptor: int) -> bool:
            return os.fstat(descriptor).st_size == entry.bytes

        return _cache(self.cache).open(self._name(entry), is_whole, fill, wait=stopped is None)


def folder_of(place: "str | Path | RemoteFolder", cache: CacheConfig | None = None) -> Path | RemoteFolder:
    """Returns the folder that a user names, by a path or a URL.

    Raises:
        Refused: It is a URL that cannot be read; see `transfer.parse_url`.
    """
    if isinstance(place, str):
        url = transfer.parse_url(place)
        return Path(place) if url is None else RemoteFolder(url, cache or CacheConfig())
    return place


def _patiently(url: str, attempt: Callable[[bool], Value], stopped: threading.Event | None = None) -> Value:
    """Returns what an attempt returns, with further ones after pauses; they are told whether to pass by caches."""
    pauses_s = iter(RETRY_AFTER_S)
    wrong = 0
    while True:
        try:
            return attempt(wrong > 0)
        except _WrongContent as error:
            wrong += 1
            reason = str(error)
            if wrong > 1:
                raise Refused(
                    f"{url}: {reason}, also when asked again; copy the whole set to the server again, and empty what "
                    f"caches it on the way"
                ) from None
        except transfer.Unavailable as error:
            reason = str(error)
        pause_s = next(pauses_s, None)
        if pause_s is None:
            raise TubeletError(
                f"{url}: cannot be fetched ({reason}), not even after {sum(RETRY_AFTER_S):g} s of pauses; check the "
                f"server and the network, then start again"
            )
        pause_s *= _jitter.uniform(1, 1 + LONGER)
        logger.warning("%s: cannot be fetched (%s); trying again in %.1f s", url, reason, pause_s)
        if stopped is None:
            time.sleep(pause_s)
        elif stopped.wait(pause_s):
            raise _Stopped


def _read(url: str, fresh: bool, stopped: threading.Event | None) -> bytes:
    with transfer.opened(url, fresh) as answer:
        return b"".join(_unless_stopped(answer.chunks, stopped))


def _download(url: str, entry: ShardEntry, part: Part, stopped: threading.Event | None, fresh: bool) -> None:
    """Writes a shard into its part and checks its length and hash as it comes."""
    part.start_over()
    digest = hashlib.sha256()
    received = 0
    with transfer.opened(url, fresh) as answer:
        if answer.length not in (None, entry.bytes):
            raise _WrongContent(f"it is {answer.length} bytes long where {INDEX_NAME} says {entry.bytes}")
        for chunk in _unless_stopped(answer.chunks, stopped):
            received += len(chunk)
            if received > entry.bytes:
                raise _WrongContent(f"it is longer than the {entry.bytes} bytes that {INDEX_NAME} says")
            digest.update(chunk)
            part.write(chunk)
    if received < entry.bytes:
        raise transfer.Unavailable(f"{received} of {entry.bytes} bytes came")
    _check_hash(digest.hexdigest(), entry.sha256)


def _unless_stopped(chunks: Iterator[bytes], stopped: threading.Event | None) -> Iterator[bytes]:
    for chunk in chunks:
        if stopped is not None and stopped.is_set():
            raise _Stopped
        yield chunk


def _check_hash(found: str, expected: str) -> None:
    if found != expected:
        raise _WrongContent(f"its SHA-256 is {found} where {INDEX_NAME} says {expected}")


def _content_of(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0)


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


@functools.lru_cache(maxsize=16)
def _cache(config: CacheConfig) -> ShardCache:
    return ShardCache(config)
