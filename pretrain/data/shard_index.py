"""The two indexes of a shard set as they lie on the disk: an entry per shard in `index.json`, and `SHARD.idx`."""

import dataclasses
import json
import os
import posixpath
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 2
"""The newest format that is read."""
PLAIN_FORMAT_VERSION = 1
"""The format of a set without splits and with one label a sample; older versions of Tubelet read it too."""
INDEX_NAME = "index.json"
LARGEST = 2**53
"""No size, offset or count is larger."""
FASTEST, SLOWEST = 100_000, 0.001
"""Frames per second that no video goes beyond."""
BLOCK_BYTES = 512
"""A tar holds at least as many for each of its members."""


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """What `index.json` says of one shard: its file name, size in bytes, samples, and both hashes."""

    name: str
    bytes: int
    sha256: str
    samples: int
    index_sha256: str

    @property
    def index_name(self) -> str:
        """The file name of the shard's own index: `shard-000000.idx` for `shard-000000.tar`."""
        return str(Path(self.name).with_suffix(".idx"))


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """What `SHARD.idx` says of the samples of one shard, column by column; offsets and sizes in bytes.

    `checksums` are CRC-32s over the stretch of the tar that a read takes: from where the JSON's bytes start to where
    the video's end. `heights` and `widths` are those of the stored frames, in pixels; None in an index that was written
    before it told them. `splits` are the names of the splits that a sample is in, with spaces between; None where
    packing was told of none. `label_lists` are the class numbers of each sample, ascending, of a multi-label set, which
    has no `labels`.
    """

    keys: Sequence[str]
    labels: Sequence[int] | None
    frames: Sequence[int]
    frame_rates: Sequence[float]
    metadata_offsets: Sequence[int]
    metadata_sizes: Sequence[int]
    video_offsets: Sequence[int]
    video_sizes: Sequence[int]
    checksums: Sequence[int]
    heights: Sequence[int] | None = None
    widths: Sequence[int] | None = None
    splits: Sequence[str] | None = None
    label_lists: Sequence[Sequence[int]] | None = None

    def to_bytes(self) -> bytes:
        """Returns the content of the `.idx` file; equal indexes give equal bytes."""
        columns = dataclasses.asdict(self)
        for name in ("splits", "label_lists"):
            if columns[name] is None:
                del columns[name]  # so that older versions read the index too
        return (json.dumps(columns, separators=(",", ":")) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "ShardIndex":
        """Reads what `to_bytes` wrote.

        Raises:
            ValueError: It is something else; the message tells what.
        """
        columns = parse_json_object(content)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, field in fields.items():
            if name not in columns and field.default is dataclasses.MISSING:
                raise ValueError(f"{name} is missing")
        for name, column in columns.items():
            if name not in fields:
                raise ValueError(f"{name[:40]!r} is no column of it")
            if column is not None or name not in MAY_BE_NONE:
                _check_column(name, column)
        return cls(**columns)

    def check_against(self, entry: ShardEntry) -> None:
        """Raises `ValueError`, telling what, if this cannot be the index of the shard that an entry describes."""
        lengths = {len(column) for column in vars(self).values() if column is not None}
        if lengths != {entry.samples}:
            shown = ", ".join(map(str, sorted(lengths)))
            raise ValueError(f"its columns hold {shown} samples where {INDEX_NAME} says {entry.samples}")
        start, length, video, size = map(
            np.asarray, (self.metadata_offsets, self.metadata_sizes, self.video_offsets, self.video_sizes)
        )
        for wrong, words in (
            (start > video, "has its JSON behind its video"),
            ((start + length > video + size) | (video + size > entry.bytes), "lies beyond the end of its tar"),
        ):
            if wrong.any():
                raise ValueError(f"sample {self.keys[int(wrong.argmax())]} {words}")

    def problems(self, classes: int) -> Iterator[tuple[str | None, str]]:
        """Yields what no sample can be: the key, None where it concerns all of them, and what is wrong.

        Args:
            classes: How many classes the set has, 0 if it is unlabelled.
        """
        labelled = self.labels is not None or self.label_lists is not None
        if labelled != bool(classes):
            differs = "labels, but the set has no classes" if labelled else "no labels, but the set has classes"
            yield None, f"has {differs}"
        frames, rates = np.asarray(self.frames), np.asarray(self.frame_rates)
        wrong = (frames < 1) | ~((rates >= SLOWEST) & (rates <= FASTEST))
        for row in np.flatnonzero(wrong).tolist():
            yield self.keys[row], f"has {self.frames[row]} frames at {self.frame_rates[row]} frames per second"
        if self.labels is not None and classes:
            for row in np.flatnonzero(np.asarray(self.labels) >= classes).tolist():
                yield self.keys[row], f"has label {self.labels[row]}, but the classes are 0 to {classes - 1}"
        for row, numbers in enumerate(self.label_lists or ()):
            if numbers and max(numbers) >= classes > 0:
                yield self.keys[row], f"has label {max(numbers)}, but the classes are 0 to {classes - 1}"


MAY_BE_NONE = ("labels", "heights", "widths", "splits", "label_lists")
OF_TEXT = ("keys", "splits")


def parse_json_object(content: bytes) -> dict[str, Any]:
    """Returns the object that bytes hold as JSON; raises `ValueError`, telling why, if they hold none."""
    try:
        parsed = json.loads(content)
    except RecursionError as error:
        raise ValueError("its lists lie too deep in each other") from error
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"holds {reprlib.repr(parsed)} in place of an object")
    return parsed


def check_set_index(content: dict[str, Any]) -> None:
    """Raises `ValueError`, naming the field, if what was read is not the `index.json` of a set of shards."""
    required = {
        "format_version": ("a format version", lambda value: _is_whole(value, 1)),
        "classes": ("a list of names", _are_names),
        "frame_rate": ("frames per second", lambda value: value is None or _is_rate(value)),
        "short_side": ("a number of pixels", lambda value: _is_whole(value, 1)),
        "resampled": ("true or false", lambda value: isinstance(value, bool)),
        "shards": ("a list of shards", lambda value: isinstance(value, list) and bool(value)),
    }
    _check_fields(content, required, "")
    if "multi_label" in content:
        _check_fields(content, {"multi_label": ("true or false", lambda value: isinstance(value, bool))}, "")
    if "samples" in content:
        _check_fields(content, {"samples": ("a number of samples", _is_whole)}, "")
    for number, shard in enumerate(content["shards"]):
        where = f"shards[{number}]"
        if not isinstance(shard, dict):
            raise ValueError(f"{where} is {reprlib.repr(shard)}, not an object")
        _check_fields(shard, SHARD_FIELDS, f"{where}.")
        unknown = next((name for name in shard if name not in SHARD_FIELDS), None)
        if unknown is not None:
            raise ValueError(f"{where} holds an unknown field {unknown[:40]!r}")
        if shard["samples"] > shard["bytes"] // BLOCK_BYTES:
            raise ValueError(f"{where}.samples is {shard['samples']}, too many for its {shard['bytes']} bytes")


def _check_fields(content: dict[str, Any], fields: dict[str, Any], above: str) -> None:
    for name, (expected, is_right) in fields.items():
        if name not in content:
            raise ValueError(f"{above}{name} is missing")
        if not is_right(content[name]):
            raise ValueError(f"{above}{name} is {reprlib.repr(content[name])}, not {expected}")


def _check_column(name: str, column: Any) -> None:
    if not isinstance(column, list):
        raise ValueError(f"{name} is {reprlib.repr(column)}, not a list")
    if name == "label_lists":
        for row in column:
            _check_column("labels", row)
        return
    kinds = (str,) if name in OF_TEXT else (int, float) if name == "frame_rates" else (int,)
    if not set(map(type, column)) <= set(kinds):
        wrong = next(value for value in column if type(value) not in kinds)
        raise ValueError(f"{name} holds {reprlib.repr(wrong)}")
    if name in OF_TEXT or not column:
        return
    if name == "frame_rates":  # of which one may be no number, so that neither least nor largest tells
        fits = all(0 <= value <= LARGEST for value in column)
    else:
        fits = min(column) >= 0 and max(column) <= LARGEST
    if not fits:
        wrong = next(value for value in column if not 0 <= value <= LARGEST)
        raise ValueError(f"{name} holds {reprlib.repr(wrong)}")


def _is_whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= LARGEST


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and SLOWEST <= value <= FASTEST


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_file_name(value: Any) -> bool:
    """Whether a value names a file in the set's own folder, and no place outside it."""
    if not isinstance(value, str) or value in ("", ".", "..") or "/" in value or "\0" in value:
        return False
    try:
        return len(os.fsencode(value)) <= 255
    except UnicodeEncodeError:
        return False


SHARD_FIELDS = {
    "name": ("the name of a file in the same folder", _is_file_name),
    "bytes": ("a number of bytes", _is_whole),
    "sha256": ("a SHA-256", _is_hash),
    "samples": ("a number of samples", _is_whole),
    "index_sha256": ("a SHA-256", _is_hash),
}


def key_and_suffix(name: str) -> tuple[str, str]:
    """Splits the name of a tar's member as webdataset does: at the first dot of its last part; suffix in lower case."""
    folder, base = posixpath.split(name)
    key, _, suffix = base.partition(".")
    return posixpath.join(folder, key), suffix.lower()
