"""Labelled sets for probes: opened, and refused where nothing can be learned from their labels."""

import numpy as np

from pretrain.data.clips import ClipConfig
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.shards import ShardSet
from pretrain.errors import Refused
from pretrain.sets import open_shards


def open_labelled(
    field: str, path: str, clip: ClipConfig, cache: CacheConfig, least: int = 1, split: str | None = None
) -> ShardSet:
    """Opens a labelled set, or a split of it.

    Args:
        field: The field that names it.
        path: Its folder or URL.
        clip: The clips that are cut from it.
        cache: Where shards from a URL are kept.
        least: Fewest videos that it may hold.
        split: The split, as `split_of` takes it; None is the whole set.

    Raises:
        Refused: It cannot be opened, has no labels or several a video, or too few videos.
    """
    shards = open_shards(field, path, clip, cache, split)
    if shards.samples < least:
        raise Refused(f"{field}: {shards.folder} holds {shards.samples} videos, too few for a probe; pack more")
    if not shards.labelled:
        raise Refused(f"{field}: {shards.folder} has no labels; pack it from class folders or with --list")
    if shards.multi_label:
        raise Refused(f"{field}: the videos of {shards.folder} have any number of labels; give a set of one label each")
    return shards


def videos_by_class(shards: ShardSet, chosen: np.ndarray | None = None) -> np.ndarray:
    """Returns `(K,)`, how many videos of each class a set holds; only `chosen` ones are counted where given."""
    labels = np.array(shards.labels())
    return np.bincount(labels if chosen is None else labels[chosen], minlength=len(shards.classes))


def refuse_other_classes(field: str, shards: ShardSet, other_field: str, other: ShardSet) -> None:
    """Raises `Refused` unless two sets have the same classes, in the same order."""
    if shards.classes != other.classes:
        differing = sorted(set(shards.classes) ^ set(other.classes)) or ["their order"]
        raise Refused(
            f"{field}: the classes of {shards.folder} are not those of {other_field} {other.folder} (they differ in "
            f"{', '.join(differing[:3])}); pack both with the same --classes"
        )


def listed(names: list[str]) -> str:
    """Returns some names for a message, the first three of many."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more classes" if len(names) > 3 else "")
