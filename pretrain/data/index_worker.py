"""What a process of `tubelet index` does: finds the samples of a tar, hashes the tar, or reads one video of it.

Kept apart from `index_tars.py` so that workers start without torch.
"""

import contextlib
import dataclasses
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import av

from pretrain.data.decode_check import decode_video
from pretrain.data.shard_index import key_and_suffix
from pretrain.data.sources import VIDEO_SUFFIXES
from pretrain.data.tar_members import tar_members
from pretrain.data.transcode import RATE_RANGE, rounded_rate
from pretrain.errors import BadSample, printable, reason_of_failure
from pretrain.files import sha256_of_file

COMPRESSIONS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""What decompresses a file, by the file's first bytes."""
MAX_LABEL_BYTES = 2**20
VIDEOS = ("mp4", *(suffix[1:] for suffix in VIDEO_SUFFIXES if suffix != ".mp4"))


@dataclasses.dataclass(frozen=True)
class ScanTask:
    """A tar whose samples are wanted, and the member of each that holds its label: cls, txt, json.FIELD, or None."""

    path: Path
    label_field: str | None


@dataclasses.dataclass(frozen=True)
class HashTask:
    """A tar whose SHA-256 is wanted."""

    path: Path


@dataclasses.dataclass(frozen=True)
class VideoTask:
    """A video in a tar, to be read and decoded; after `stall_s` seconds without progress it is given up."""

    path: Path
    offset: int
    size_bytes: int
    decode: Literal["three", "all"]
    stall_s: float


@dataclasses.dataclass(frozen=True)
class FoundSample:
    """A sample of a tar: its key, where its video lies in bytes, and its label as text, None if it has none."""

    key: str
    offset: int
    size_bytes: int
    label: str | None


@dataclasses.dataclass(frozen=True)
class ScannedTar:
    """What a tar holds.

    Attributes:
        size_bytes: Its size.
        samples: Samples with a video, in the order of the tar.
        rejected: Keys of the others, with the reason of each; the key is empty where the tar itself is damaged.
        decompressor: What decompresses it, if it is compressed.
    """

    size_bytes: int
    samples: tuple[FoundSample, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    decompressor: str | None = None


@dataclasses.dataclass(frozen=True)
class IndexedVideo:
    """What the index tells of a video; size in pixels, CRC-32 of its bytes."""

    frames: int
    frame_rate: float
    height: int
    width: int
    checksum: int
    codec: str


@dataclasses.dataclass(frozen=True)
class UnreadableTar:
    """Why the SHA-256 of a tar, whose headers were read before, cannot be told."""

    reason: str


def index_task(task: ScanTask | HashTask | VideoTask) -> ScannedTar | str | UnreadableTar | IndexedVideo:
    """Returns what is wanted: the samples of a tar, its SHA-256, or what a video is, which is its reason if it is bad.

    Whatever goes wrong with a strange file is its reason.
    """
    if isinstance(task, HashTask):
        try:
            return sha256_of_file(task.path)
        except OSError as error:
            return UnreadableTar(f"cannot be read ({error.strerror})")
    if isinstance(task, ScanTask):
        return scan_tar(task)
    try:
        return read_video(task)
    except Exception as error:
        return reason_of_failure(error)


def scan_tar(task: ScanTask) -> ScannedTar:
    """Finds the samples of a WebDataset tar by its headers, and reads their labels."""
    try:
        with open(task.path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            start = file.read(6)
            decompressor = next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), None)
            if decompressor is not None:
                return ScannedTar(size_bytes, decompressor=decompressor)
            return _scan(file, size_bytes, task.label_field)
    except OSError as error:
        return ScannedTar(0, rejected=(("", f"cannot be read ({error.strerror})"),))


def read_video(task: VideoTask) -> IndexedVideo:
    """Reads and decodes a video.

    Raises:
        BadSample: It cannot be decoded, or names no frame rate; the message is the reason alone.
    """
    av.logging.set_level(av.logging.PANIC)
    with open(task.path, "rb") as file:
        file.seek(task.offset)
        video = file.read(task.size_bytes)
    frames, size = decode_video(video, task.decode, task.stall_s)
    if size is None:
        raise BadSample("no frame in it")
    frame_rate, codec = _rate_and_codec(video)
    return IndexedVideo(frames, frame_rate, *size, zlib.crc32(video), codec)


def _scan(file: BinaryIO, size_bytes: int, label_field: str | None) -> ScannedTar:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    links: set[str] = set()
    rejected: dict[str, str] = {}
    try:
        for member in _members(file):
            key, suffix = key_and_suffix(member.name)
            if not member.isfile():
                links.add(key)
                continue
            members = samples.setdefault(key, {})
            if suffix in members:
                rejected[key] = f"its {suffix} stands twice in the tar"
            elif member.offset_data + member.size > size_bytes:
                rejected[key] = "is cut off at the end of the tar"
            elif member.issparse():
                rejected[key] = "is stored as a sparse file"
            members[suffix] = member
    except tarfile.TarError as error:
        rejected[""] = f"not a whole tar ({error}): nothing after its {len(samples)} first samples can be found"
    rejected |= dict.fromkeys(sorted(links - samples.keys()), "is no file in the tar, but a link or a device")
    found = []
    for key, members in samples.items():
        try:
            if key not in rejected:
                found.append(_found(file, key, members, label_field))
        except BadSample as error:
            rejected[key] = str(error)
    reasons = tuple((key, printable(reason)) for key, reason in rejected.items())
    return ScannedTar(size_bytes, tuple(found), reasons)


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yields what a tar holds but for folders, and for what webdataset passes over by its name."""
    for member in tar_members(file):
        if not member.isdir() and not os.path.basename(member.name).startswith((".", "__")):
            yield member


def _found(file: BinaryIO, key: str, members: dict[str, tarfile.TarInfo], label_field: str | None) -> FoundSample:
    video = next((members[suffix] for suffix in VIDEOS if suffix in members), None)
    if video is None:
        raise BadSample(f"holds no video, only {', '.join(sorted(members)) or 'a file without a suffix'}")
    label = None
    if label_field is not None:
        suffix, _, field = label_field.partition(".")
        if suffix in members:
            label = _label(file, members[suffix], field)
    return FoundSample(key, video.offset_data, video.size, label)


def _label(file: BinaryIO, member: tarfile.TarInfo, field: str) -> str:
    suffix = key_and_suffix(member.name)[1]
    file.seek(member.offset_data)
    content = file.read(min(member.size, MAX_LABEL_BYTES))
    try:
        value: Any = json.loads(content) if field else content.decode()
        for name in field.split(".") if field else ():
            value = value[name]
    except (KeyError, TypeError) as error:
        raise BadSample(f"its {suffix} has no field {field}") from error
    except ValueError as error:
        raise BadSample(f"its {suffix} cannot be read ({error})") from error
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise BadSample(f"its {suffix} holds {value!r} in place of a class")
    return str(value).strip()


def _rate_and_codec(video: bytes) -> tuple[float, str]:
    with contextlib.suppress(av.FFmpegError), av.open(io.BytesIO(video), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        low, high = RATE_RANGE
        for rate in (stream.average_rate, stream.guessed_rate):
            if rate is not None and low <= rate <= high:
                return float(rounded_rate(rate)), stream.codec_context.name
    raise BadSample(f"names no frame rate from {float(RATE_RANGE[0]):g} to {float(RATE_RANGE[1]):g}")
