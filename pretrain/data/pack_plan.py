"""The plan of a pack: every decision that the bytes of its shards depend on, made before the first video is opened."""

import dataclasses
import hashlib
import json
import os
from typing import Any

from pretrain.data.mp4_encoder import CRF, PRESET
from pretrain.data.shards import FORMAT_VERSION
from pretrain.data.sources import Source, Sources, key_of


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
    """

    sources: Sources
    shards: tuple[PlannedShard, ...]
    settings: dict[str, Any]


def make_plan(
    sources: Sources, *, short_side: int, gop: int, frame_rate: float | None, samples_per_shard: int, seed: int
) -> PackPlan:
    """Orders the videos and deals them out to shards.

    The order is that of a hash of seed and path: mixed over classes, and the same for a video whatever else is packed.

    Args:
        sources: The videos.
        short_side: Largest short side in pixels.
        gop: Frames from keyframe to keyframe.
        frame_rate: Frames per second of the stored videos, None to keep each one's own.
        samples_per_shard: Videos per shard.
        seed: Chooses the order.
    """
    videos = sorted(
        sources.videos, key=lambda video: hashlib.sha256(f"{seed}:".encode() + os.fsencode(video.path)).digest()
    )
    shards = tuple(
        PlannedShard(f"shard-{number:06d}.tar", tuple(videos[start : start + samples_per_shard]))
        for number, start in enumerate(range(0, len(videos), samples_per_shard))
    )
    settings = {
        "format_version": FORMAT_VERSION,
        "short_side": short_side,
        "gop": gop,
        "fps": frame_rate,
        "preset": PRESET,
        "crf": CRF,
        "samples_per_shard": samples_per_shard,
        "seed": seed,
        "classes": list(sources.classes),
        "videos": len(videos),
        "videos_sha256": _hash_of_videos(sources, videos),
    }
    return PackPlan(sources, shards, settings)


def _hash_of_videos(sources: Sources, videos: list[Source]) -> str:
    """A hash of paths, labels and sizes: when any of them changes, these are other videos."""
    digest = hashlib.sha256()
    for video in videos:
        digest.update(json.dumps([key_of(video.path), video.label, _size_bytes(sources, video)]).encode())
    return digest.hexdigest()


def _size_bytes(sources: Sources, video: Source) -> int:
    try:
        return (sources.root / video.path).stat().st_size
    except OSError:
        return -1
