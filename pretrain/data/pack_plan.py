"""The plan of a pack: every decision that the bytes of its shards depend on, made before the first video is opened."""

import dataclasses
import hashlib
import json
import os
from typing import Any

from pretrain.data.mp4_encoder import CRF, PRESET
from pretrain.data.shard_index import FORMAT_VERSION, PLAIN_FORMAT_VERSION
from pretrain.data.sources import Source, Sources


@dataclasses.dataclass(frozen=True)
class PlannedShard:
    """A shard to write: its file name, and the videos that it takes if they can be decoded."""

    name: str
    videos: tuple[Source, ...]


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """What is packed and how.

    Attributes:
        sources: The videos, their root and their classes.
        shards: Which videos go into which shard, in order.
        settings: All that decides the bytes of the shards, as JSON: two plans with equal settings make equal shards.
        missing: Paths of the videos that are not there, as annotation files and lists may name.
    """

    sources: Sources
    shards: tuple[PlannedShard, ...]
    settings: dict[str, Any]
    missing: frozenset[str]


def make_plan(
    sources: Sources,
    *,
    short_side: int,
    gop: int,
    frame_rate: float | None,
    samples_per_shard: int,
    seed: int,
    segment_s: float | None = None,
) -> PackPlan:
    """Orders the videos and deals them out to shards.

    The order is that of a hash of seed, path and segment: mixed over classes and over the segments of a video, and the
    same for a video whatever else is packed.

    Args:
        sources: The videos.
        short_side: Largest short side in pixels.
        gop: Frames from keyframe to keyframe.
        frame_rate: Frames per second of the stored videos, None to keep each one's own.
        samples_per_shard: Videos per shard.
        seed: Chooses the order.
        segment_s: Seconds into which long videos were cut, None if they were not.
    """

    def place(video: Source) -> bytes:
        segment = "" if video.segment is None else f"\0{video.segment.start_ms}-{video.segment.end_ms}"
        return hashlib.sha256(f"{seed}:".encode() + os.fsencode(video.path) + segment.encode()).digest()

    videos = sorted(sources.videos, key=place)
    shards = tuple(
        PlannedShard(name, tuple(videos[number * samples_per_shard : (number + 1) * samples_per_shard]))
        for number, name in enumerate(shard_names(len(videos), samples_per_shard))
    )
    sizes_bytes = {video.path: _size_bytes(sources, video) for video in videos}
    is_plain = not sources.multi_label and not any(video.splits for video in videos)
    settings = {
        "format_version": PLAIN_FORMAT_VERSION if is_plain else FORMAT_VERSION,
        "short_side": short_side,
        "gop": gop,
        "fps": frame_rate,
        "preset": PRESET,
        "crf": CRF,
        "samples_per_shard": samples_per_shard,
        "seed": seed,
        "segment_s": segment_s,
        "classes": list(sources.classes),
        **({"multi_label": True} if sources.multi_label else {}),
        "videos": len(videos),
        "videos_sha256": _hash_of_videos(videos, sizes_bytes),
    }
    missing = frozenset(path for path, size_bytes in sizes_bytes.items() if size_bytes < 0)
    return PackPlan(sources, shards, settings, missing)


def shard_names(videos: int, samples_per_shard: int) -> list[str]:
    """Returns the names of the shards that so many videos are dealt out to."""
    return [f"shard-{number:06d}.tar" for number in range(-(-videos // samples_per_shard))]


def _hash_of_videos(videos: list[Source], sizes_bytes: dict[str, int]) -> str:
    """A hash of paths, labels, sizes and splits: when any of them changes, these are other videos."""
    digest = hashlib.sha256()
    for video in videos:
        splits = [video.splits] if video.splits else []
        digest.update(json.dumps([video.key, video.label, sizes_bytes[video.path], *splits]).encode())
    return digest.hexdigest()


def _size_bytes(sources: Sources, video: Source) -> int:
    try:
        return (sources.root / video.path).stat().st_size
    except OSError:
        return -1
