"""Writes one shard: a WebDataset tar by webdataset's own writer, and the index of where its samples lie.

The same samples give the same bytes: owner, mode and time are fixed. The index is made from the finished tar, read
back by the standard library's `tarfile`, so it tells what is on the disk and not what was meant to be there.
"""

import dataclasses
import hashlib
import itertools
import json
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.data.segments import Segment
from pretrain.data.shard_index import ShardEntry, ShardIndex
from pretrain.data.transcode import Transcoded
from pretrain.errors import Refused
from pretrain.files import replacing, sha256_of_file, write_bytes


@dataclasses.dataclass(frozen=True)
class PackedSample:
    """A sample on its way into a shard.

    Attributes:
        key: Its key.
        source: The path it came from.
        label: Its class number, or its class numbers in a multi-label set.
        video: The video.
        segment: What was cut out of its source, if not all.
        splits: The splits of the data set that it is in, if packing was told of any.
    """

    key: str
    source: str
    label: int | tuple[int, ...] | None
    video: Transcoded
    segment: Segment | None = None
    splits: tuple[str, ...] = ()

    def members(self) -> dict[str, Any]:
        """Returns what webdataset's writer takes: the key, and the bytes of each member by its suffix."""
        video = self.video
        metadata = {
            "source": self.source,
            "frames": video.frames,
            "frame_rate": video.frame_rate,
            "height": video.height,
            "width": video.width,
            "duration": round(video.frames / video.frame_rate, 6),
        }
        if self.segment is not None:
            metadata |= {"start": self.segment.start_ms / 1000, "end": self.segment.end_ms / 1000}
        if self.splits:
            metadata |= {"splits": list(self.splits)}
        if isinstance(self.label, tuple):
            metadata |= {"labels": list(self.label)}
        label = {"cls": str(self.label).encode()} if isinstance(self.label, int) else {}
        return {"__key__": self.key, "json": json.dumps(metadata).encode(), "mp4": video.video, **label}


def write_shard(path: Path, samples: Iterable[PackedSample]) -> ShardEntry | None:
    """Writes a shard and its index, each whole or not at all, and returns what `index.json` says of it.

    Args:
        path: The tar to write; the index goes beside it.
        samples: The samples, taken one by one as they are written; if there are none, nothing is written.

    Raises:
        OSError: The disk is full or not writable.
    """
    samples = iter(samples)
    first = next(samples, None)
    if first is None:
        return None
    from webdataset import TarWriter  # imports torch, which takes seconds: not before there is something to write

    with replacing(path) as temporary:
        with (
            open(temporary, "wb") as file,
            TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer,
        ):
            for sample in itertools.chain([first], samples):
                writer.write(sample.members())
        index = index_tar(temporary)
        size_bytes, sha256 = temporary.stat().st_size, sha256_of_file(temporary)
    content = index.to_bytes()
    entry = ShardEntry(path.name, size_bytes, sha256, len(index.keys), hashlib.sha256(content).hexdigest())
    write_bytes(path.with_name(entry.index_name), content)
    return entry


def index_tar(path: Path) -> ShardIndex:
    """Returns where the samples of a WebDataset tar lie.

    Raises:
        Refused: It is compressed, damaged or empty, or a sample lacks its video or its JSON.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                samples.setdefault(key, {})[suffix] = member
    except tarfile.TarError as error:
        raise Refused(f"{path}: not a plain tar ({error}); decompress it (gunzip) or pack the videos again") from error
    if not samples:
        raise Refused(f"{path}: holds no sample; pack the videos again")
    with open(path, "rb") as file:
        rows = [_row(path, file, key, members) for key, members in samples.items()]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    labels, splits, label_lists = (columns.pop(name) for name in ("labels", "splits", "label_lists"))
    return ShardIndex(
        labels=labels if any(label is not None for label in labels) else None,
        label_lists=label_lists if any(row is not None for row in label_lists) else None,
        splits=splits if any(splits) else None,
        **columns,
    )


def _row(path: Path, file: Any, key: str, members: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    if not {"json", "mp4"} <= members.keys():
        raise Refused(f"{path}: sample {key} lacks its mp4 or its json; pack the videos again")
    metadata_member, video_member = members["json"], members["mp4"]
    start, end = metadata_member.offset_data, video_member.offset_data + video_member.size
    file.seek(start)
    stretch = file.read(max(end - start, 0))
    try:
        metadata = json.loads(stretch[: metadata_member.size])
        frames, frame_rate = metadata["frames"], metadata["frame_rate"]
        height, width = metadata["height"], metadata["width"]
        splits, label_list = " ".join(metadata.get("splits", ())), metadata.get("labels")
        label = None
        if "cls" in members:
            file.seek(members["cls"].offset_data)
            label = int(file.read(members["cls"].size))
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"{path}: the json or cls of sample {key} is damaged ({error!r}); pack the videos again"
        ) from error
    return {
        "keys": key,
        "labels": label,
        "frames": frames,
        "frame_rates": frame_rate,
        "metadata_offsets": start,
        "metadata_sizes": metadata_member.size,
        "video_offsets": video_member.offset_data,
        "video_sizes": video_member.size,
        "checksums": zlib.crc32(stretch),
        "heights": height,
        "widths": width,
        "splits": splits,
        "label_lists": label_list,
    }
