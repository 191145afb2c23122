"""Writes the index of tars that others made: links where the tars lie elsewhere, an `.idx` each, `index.json` last."""

import dataclasses
import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from pretrain.data.index_worker import FoundSample, IndexedVideo
from pretrain.data.pack_folder import PLAN_NAME, REJECTED_NAME, WORK_NAME, Rejection
from pretrain.data.shard_index import INDEX_NAME, PLAIN_FORMAT_VERSION, ShardEntry, ShardIndex
from pretrain.errors import Refused
from pretrain.files import append_json_lines, is_out_of_space, replacing, write_bytes, write_json

OURS = b'{"keys":'
"""How an `.idx` of ours begins; other programs give their files this name too."""


class IndexedTar(NamedTuple):
    """A tar, its size and SHA-256, and its samples in order, with the number of their class."""

    path: Path
    size_bytes: int
    sha256: str
    samples: tuple[tuple[FoundSample, int | None, IndexedVideo], ...]


def check_folder(folder: Path, tars: list[Path]) -> None:
    """Raises `Refused` if the index cannot be written to a folder without harm to what is there."""
    if os.path.exists(folder) and not folder.is_dir():
        raise Refused(f"out: {folder} is not a folder; name another one for the index")
    for name in (PLAN_NAME, WORK_NAME, INDEX_NAME):
        if os.path.exists(folder / name):
            remedy = f"remove {name} to index the tars anew" if name == INDEX_NAME else "name another folder"
            raise Refused(f"out: {folder} holds {name} already; {remedy}")
    repeated = next((stem for stem, count in Counter(tar.stem for tar in tars).items() if count > 1), None)
    if repeated is not None:
        raise Refused(f"tars: two are called {repeated}; rename one of them")
    for tar in tars:
        path, index_path = folder / tar.name, (folder / tar.name).with_suffix(".idx")
        if os.path.lexists(path) and not (path.exists() and path.samefile(tar)):
            raise Refused(f"out: {path} is there already and is another file than {tar}; name another folder")
        if os.path.exists(index_path) and not index_path.read_bytes().startswith(OURS):
            raise Refused(f"out: {index_path} is there already and is no index of Tubelet's; name another folder")


def write_index(folder: Path, tars: list[IndexedTar], classes: tuple[str, ...], rejected: list[Rejection]) -> None:
    """Writes the index of tars; `index.json`, which makes the folder a shard set, comes last.

    Raises:
        Refused: The folder cannot be written, or a tar changed meanwhile.
        OSError: The disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        prefixed = _repeats_keys(tars)
        entries = [_write_shard(folder, tar, bool(classes), prefixed) for tar in tars]
        _write_rejected(folder, rejected)
        heights_and_widths = [(video.height, video.width) for tar in tars for _, _, video in tar.samples]
        content = {
            "format_version": PLAIN_FORMAT_VERSION,
            "classes": list(classes),
            "frame_rate": None,
            "short_side": max(min(size) for size in heights_and_widths),
            "resampled": False,
            "samples": sum(entry.samples for entry in entries),
            "shards": [dataclasses.asdict(entry) for entry in entries],
        }
        write_json(folder / INDEX_NAME, content)
    except OSError as error:
        if is_out_of_space(error):
            raise
        raise Refused(f"out: {folder} cannot be written ({error.strerror}); name another folder") from error


def _repeats_keys(tars: list[IndexedTar]) -> bool:
    """Whether a key stands in two tars; then every key is told with its tar's name."""
    keys = [sample.key for tar in tars for sample, _, _ in tar.samples]
    return len(set(keys)) < len(keys)


def _write_shard(folder: Path, tar: IndexedTar, labelled: bool, prefixed: bool) -> ShardEntry:
    if tar.path.stat().st_size != tar.size_bytes:
        raise Refused(f"{tar.path}: changed while it was indexed; wait until it is whole, and index again")
    _link(folder / tar.path.name, tar.path)
    found = [sample for sample, _, _ in tar.samples]
    videos = [video for _, _, video in tar.samples]
    offsets = [sample.offset for sample in found]
    content = ShardIndex(
        keys=[f"{tar.path.stem}/{sample.key}" if prefixed else sample.key for sample in found],
        labels=[label for _, label, _ in tar.samples if label is not None] if labelled else None,
        frames=[video.frames for video in videos],
        frame_rates=[video.frame_rate for video in videos],
        metadata_offsets=offsets,
        metadata_sizes=[0] * len(found),
        video_offsets=offsets,
        video_sizes=[sample.size_bytes for sample in found],
        checksums=[video.checksum for video in videos],
        heights=[video.height for video in videos],
        widths=[video.width for video in videos],
    ).to_bytes()
    entry = ShardEntry(tar.path.name, tar.size_bytes, tar.sha256, len(found), hashlib.sha256(content).hexdigest())
    write_bytes(folder / entry.index_name, content)
    return entry


def _link(link: Path, tar: Path) -> None:
    """Links to a tar, relative to the link's folder; leaves a tar, or a link to it, that is there already."""
    if not os.path.lexists(link):
        link.symlink_to(os.path.relpath(tar.resolve(), link.parent.resolve()))


def _write_rejected(folder: Path, rejected: list[Rejection]) -> None:
    path = folder / REJECTED_NAME
    path.unlink(missing_ok=True)
    if rejected:
        with replacing(path) as temporary:
            append_json_lines(temporary, [dataclasses.asdict(rejection) for rejection in rejected])
