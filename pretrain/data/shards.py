"""The reader of a shard set: WebDataset tars, the index beside them, and samples by number in one read each.

A shard set is a folder of plain WebDataset tars with `index.json` (the set) and one `SHARD.idx` per tar (where each
sample lies); README.md beside this file shows both. Nothing here parses a tar, shuffles or decodes: the order of
samples is decided in `order.py`, a video is decoded in `video.py`, and shards are written by `pack.py`. A set behind a
URL is read from the node's copies of its files, which `remote.py` fetches.
"""

import bisect
import dataclasses
import hashlib
import itertools
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from pretrain.data.local_files import check_files_of, patiently, read_index_file, read_shard_index
from pretrain.data.remote import RemoteFolder, folder_of
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.shard_index import (
    FORMAT_VERSION,
    INDEX_NAME,
    ShardEntry,
    ShardIndex,
    check_set_index,
    parse_json_object,
)
from pretrain.errors import BadSample, Refused, TubeletError

MAX_OPEN_FILES = 64
MAX_LOADED_INDEXES = 1024
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One stored video as it lies in a shard, undecoded.

    Attributes:
        key: Its name in the shard, unique in the set.
        video: The bytes of the mp4 file.
        label: The number of its class, None in an unlabelled or a multi-label set.
        frames: How many frames the video holds.
        frame_rate: Frames per second of the stored video.
        metadata: The JSON member: "source" (the path it was packed from), frames, frame_rate, height, width, duration.
    """

    key: str
    video: bytes
    label: int | None
    frames: int
    frame_rate: float
    metadata: dict[str, Any]


class DamagedJson(BadSample):
    """The JSON of a sample is as it was packed, and no JSON."""


class ShardSet:
    """An opened shard set, whose samples are numbered through its shards in the order of `index.json`.

    It may be pickled (open files stay behind), shared between threads and used after a fork.

    Attributes:
        folder: Where the shards are: a folder, or what stands for a URL.
        classes: The names of the classes; empty if the set is unlabelled.
        multi_label: Whether a sample has any number of labels, also none, instead of one.
        frame_rate: Frames per second of every video, None if each kept its own.
        short_side: The largest short side, in pixels, of any stored video.
        resampled: Whether packing set the frame rate (`--fps`).
        shards: The entry of each shard.
        samples_per_shard: How many samples each shard holds.
        samples: How many samples the set holds.
        fingerprint: SHA-256 of `index.json`, which holds the hashes of all else.
        cache_hits: Reads since opening in this process that found their shard in the cache; 0 for a folder.
        cache_misses: Reads since then that waited for their shard to be downloaded.
        split: What part of a set this is, if it is one; see `Subset`.
        lenient: Whether a `.idx` may tell of samples what cannot be: `tubelet check` names them all.
    """

    def __init__(self, folder: Path | RemoteFolder, content: dict[str, Any], fingerprint: str) -> None:
        """Takes the parsed `index.json`; use `ShardSet.open`, which checks it."""
        self.folder = folder
        self.classes: tuple[str, ...] = tuple(content["classes"])
        self.multi_label: bool = content.get("multi_label", False)
        self.frame_rate: float | None = content["frame_rate"]
        self.short_side: int = content["short_side"]
        self.resampled: bool = content["resampled"]
        self.shards = tuple(ShardEntry(**entry) for entry in content["shards"])
        self.samples_per_shard = tuple(shard.samples for shard in self.shards)
        self.samples = sum(self.samples_per_shard)
        self.fingerprint = fingerprint
        self.split: str | None = None
        self.lenient = False
        self._ends = list(itertools.accumulate(self.samples_per_shard))
        self._start_empty()

    @classmethod
    def open(
        cls, folder: str | Path | RemoteFolder, check_files: bool = True, cache: CacheConfig | None = None
    ) -> "ShardSet":
        """Opens a folder of shards and checks that all that its index names is there.

        Names and sizes are checked here, unless `check_files` is False, and the hash of a `.idx` when it is first read;
        the hashes of the shards themselves, which take a full read, are checked by `tubelet check` alone. Behind a URL
        only the index is looked at here: the others are checked, hashes included, when they are downloaded.

        Args:
            folder: A folder, or an `http://`, `https://` or `s3://` URL.
            check_files: Whether to look at each file that the index of a folder names.
            cache: Where files from a URL are kept.

        Raises:
            Refused: The folder or its index is missing, not readable, of a newer format, or does not match its files.
            TubeletError: The index cannot be fetched, not even after a while.
        """
        folder = folder_of(folder, cache)
        path = folder / INDEX_NAME
        content_bytes = folder.read_index() if isinstance(folder, RemoteFolder) else read_index_file(folder)
        try:
            content = parse_json_object(content_bytes)
            version = content.get("format_version")
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise Refused(
                    f"{path}: format version {version} is newer than {FORMAT_VERSION}, the newest that this Tubelet "
                    "reads; upgrade Tubelet or pack the videos again"
                )
            check_set_index(content)
        except ValueError as error:
            raise Refused(f"{path}: not a shard index ({error}); pack the videos again with `tubelet pack`") from error
        opened = cls(folder, content, hashlib.sha256(content_bytes).hexdigest())
        opened.lenient = not check_files
        if check_files and isinstance(folder, Path):
            for shard in opened.shards:
                check_files_of(folder, shard)
        return opened

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label, or any number of them in a multi-label set."""
        return bool(self.classes)

    def __len__(self) -> int:
        """The number of samples."""
        return self.samples

    def locate(self, number: int) -> tuple[int, int]:
        """Returns the shard of a sample and the sample's row in its index, both counted from zero.

        Raises:
            IndexError: There is no sample of that number.
        """
        if not 0 <= number < self.samples:
            raise IndexError(f"sample {number} of {self.samples} in {self.folder}")
        shard = bisect.bisect_right(self._ends, number)
        return shard, number - (self._ends[shard] - self.samples_per_shard[shard])

    def key(self, number: int) -> str:
        """Returns the key of a sample."""
        shard, row = self.locate(number)
        return self.shard_index(shard).keys[row]

    def keys(self) -> list[str]:
        """Returns the key of every sample, in order of sample number; reads the `.idx` files, never a shard."""
        return [key for shard in range(len(self.shards)) for key in self._load_index(shard).keys]

    def splits(self) -> list[str]:
        """Returns for every sample the names of the splits that it is in, with spaces between."""
        indexes = (self._load_index(shard) for shard in range(len(self.shards)))
        return [splits for index in indexes for splits in index.splits or [""] * len(index.keys)]

    def labels(self) -> list[int]:
        """Returns the label of every sample, in order of sample number; reads the `.idx` files, never a shard.

        Raises:
            Refused: The set is unlabelled, or its samples have several labels.
        """
        if self.multi_label:
            raise Refused(f"{self.folder}: its samples have any number of labels; pack it with one label for each")
        self._refuse_unlabelled()
        return [label for shard in range(len(self.shards)) for label in self._load_index(shard).labels or ()]

    def label_lists(self) -> list[tuple[int, ...]]:
        """Returns the labels of every sample, one or any number, in order of sample number.

        Raises:
            Refused: The set is unlabelled.
        """
        if not self.multi_label:
            return [(label,) for label in self.labels()]
        return [tuple(row) for shard in range(len(self.shards)) for row in self._load_index(shard).label_lists or ()]

    def label(self, number: int) -> int | tuple[int, ...] | None:
        """Returns the label of a sample; all of them in a multi-label set; None in an unlabelled one."""
        shard, row = self.locate(number)
        index = self.shard_index(shard)
        if index.label_lists is not None:
            return tuple(index.label_lists[row])
        return None if index.labels is None else index.labels[row]

    def _refuse_unlabelled(self) -> None:
        if not self.labelled:
            raise Refused(
                f"{self.folder}: these shards have no labels; pack them from a folder of class folders or with --list"
            )

    def read(self, number: int) -> Sample:
        """Reads a sample with one ranged read.

        Raises:
            BadSample: The bytes are not those that were packed, or its JSON cannot be read.
            TubeletError: The shard cannot be read, not even after a while, or is shorter than its index says.
            Refused: The shard's index is missing or was changed.
        """
        shard, row = self.locate(number)
        index = self.shard_index(shard)
        start = index.metadata_offsets[row]
        video_start = index.video_offsets[row] - start
        length = video_start + index.video_sizes[row]
        path = self.folder / self.shards[shard].name
        stretch = patiently(path, lambda: self._read_stretch(shard, start, length))
        if zlib.crc32(stretch) != index.checksums[row] and self._mended(shard):
            stretch = self._read_stretch(shard, start, length)
        key = index.keys[row]
        if zlib.crc32(stretch) != index.checksums[row]:
            raise BadSample(f"{path}: sample {key} is damaged (its checksum differs); restore the shard from a copy")
        try:
            metadata = parse_json_object(stretch[: index.metadata_sizes[row]] or b"{}")
        except ValueError as error:
            raise DamagedJson(f"{path}: sample {key} has a JSON that cannot be read ({error})") from error
        return Sample(
            key=key,
            video=stretch[video_start:],
            label=index.labels[row] if index.labels is not None else None,
            frames=index.frames[row],
            frame_rate=index.frame_rates[row],
            metadata=metadata,
        )

    def shard_index(self, shard: int) -> ShardIndex:
        """Returns the index of a shard, loading and verifying it when it is first needed.

        Raises:
            Refused: The `.idx` file is missing or is not the one that `index.json` names.
            TubeletError: It cannot be read, not even after a while.
        """
        return self._indexes.get(shard, lambda: self._load_index(shard))

    def _load_index(self, shard: int) -> ShardIndex:
        entry = self.shards[shard]
        path = self.folder / entry.index_name
        content = self._read_shard_index(entry)
        try:
            index = ShardIndex.from_bytes(content)
            index.check_against(entry)
        except ValueError as error:
            raise Refused(f"{path}: not the index of its shard: {error}; make the set again") from error
        for key, reason in () if self.lenient else index.problems(len(self.classes)):
            subject = "it" if key is None else f"sample {key}"
            raise Refused(f"{path}: {subject} {reason}; make the set again")
        return index

    def _read_shard_index(self, entry: ShardEntry) -> bytes:
        if isinstance(self.folder, RemoteFolder):
            return self.folder.read_shard_index(entry)
        return read_shard_index(self.folder, entry)

    def _read_stretch(self, shard: int, start: int, length: int) -> bytes:
        file = self._open_shard(shard)
        try:
            stretch = os.pread(file.descriptor, length, start)
            while len(stretch) < length:  # the kernel may hand out less than was asked for, above 2 GiB always
                more = os.pread(file.descriptor, length - len(stretch), start + len(stretch))
                if not more:
                    path = self.folder / self.shards[shard].name
                    raise TubeletError(f"{path}: shorter than its index says; copy the shard again")
                stretch += more
        except OSError:
            self._files.drop(shard)  # the next try opens the file anew: a stale handle stays stale
            raise
        return stretch

    def _open_shard(self, shard: int) -> "_OpenFile":
        """Opens a shard, a cached one for this read only: the cache may remove what nobody holds open."""
        if isinstance(self.folder, Path):
            path = self.folder / self.shards[shard].name
            return self._files.get(shard, lambda: _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC)))
        descriptor, was_there = self.folder.open_shard(self.shards[shard])
        with self._counting:
            self.cache_hits += was_there
            self.cache_misses += not was_there
        return _OpenFile(descriptor)

    def _mended(self, shard: int) -> bool:
        """Whether a shard was damaged in the cache alone, so that another read may do better."""
        return isinstance(self.folder, RemoteFolder) and self.folder.drop_if_damaged(self.shards[shard])

    def _start_empty(self) -> None:
        self.cache_hits = 0
        self.cache_misses = 0
        self._counting = threading.Lock()
        self._files: _Recent[_OpenFile] = _Recent(MAX_OPEN_FILES)
        self._indexes: _Recent[ShardIndex] = _Recent(MAX_LOADED_INDEXES)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves open files, loaded indexes and counts behind."""
        left_behind = ("_files", "_indexes", "_counting", "cache_hits", "cache_misses")
        return {name: value for name, value in vars(self).items() if name not in left_behind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Starts with no file open."""
        vars(self).update(state)
        self._start_empty()


class _OpenFile:
    """A file descriptor that closes when nobody holds it, so that dropping it never hurts a read under way."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class _Recent(Generic[Value]):
    """The values of the shards used last, at most `limit` of them; safe between threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[int, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int, load: Callable[[], Value]) -> Value:
        with self._lock:
            if shard in self._values:
                self._values.move_to_end(shard)
                return self._values[shard]
        value = load()  # without the lock: a download must not hold up those who read another shard
        with self._lock:
            self._values[shard] = value
            self._values.move_to_end(shard)
            while len(self._values) > self._limit:
                self._values.popitem(last=False)
            return value

    def drop(self, shard: int) -> None:
        with self._lock:
            self._values.pop(shard, None)
