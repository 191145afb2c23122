"""`tubelet index`: our index for WebDataset tars that others made; nothing is transcoded or copied.

Three passes, the first two quick to fail: the headers of every tar, with the labels; the numbers of the classes; then
every video, decoded once so that what training cannot read is listed now. The index is written at the very end. It
refers to a tar by its name in the index's folder: where the tars lie elsewhere, the folder gets links to them.
"""

import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain.data.class_names import read_classes
from pretrain.data.index_worker import (
    FoundSample,
    HashTask,
    IndexedVideo,
    ScannedTar,
    ScanTask,
    UnreadableTar,
    VideoTask,
    index_task,
)
from pretrain.data.index_writer import IndexedTar, check_folder, write_index
from pretrain.data.pack_folder import REJECTED_NAME, Rejection
from pretrain.data.pool import Died, WorkerPool, refuse_pool_options
from pretrain.data.shards import ShardSet
from pretrain.data.sources import MAX_CLASSES
from pretrain.data.terminal import TaskProgress, add_reasons, counted
from pretrain.errors import Refused, TubeletError

LABEL_FIELDS = re.compile(r"cls|txt|json(\.[^.]+)+")
INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """Which tars to index, and where their labels are."""

    tars: list[str]
    """The tars, or one folder that holds them."""
    out: str | None = None
    """Folder of the index: by default the folder that holds the tars; another one gets links to them."""
    label_field: str | None = None
    """Where labels are: cls, txt, or json.FIELD; by default cls, where any sample has one."""
    classes: str | None = None
    """Class names in the order of their numbers: a file with one a line, a labels .json, a folder of shards that has
    them, or names with commas between."""
    unlabelled: bool = False
    """Index without labels, even where there are some."""
    decode: Literal["three", "all"] = "three"
    """Frames of each sample to decode: the first, middle and last one (three), or all."""
    jobs: int = 0
    """Processes that read and decode; 0 is one per core."""
    stall_s: float = 60
    """Seconds without progress after which a sample is given up."""

    def validate(self) -> None:
        """Raises `Refused` for what cannot be."""
        if self.label_field is not None and not LABEL_FIELDS.fullmatch(self.label_field):
            raise Refused(f"label_field: {self.label_field} does not do; use cls, txt, or json.FIELD")
        if self.unlabelled and (self.label_field or self.classes):
            raise Refused("unlabelled: takes neither label_field nor classes; drop one or the other")
        refuse_pool_options(self.jobs, self.stall_s)


@dataclasses.dataclass(frozen=True)
class IndexSummary:
    """What came of indexing tars.

    Attributes:
        shards: The set, opened.
        rejected: The samples that are not in it, as TAR/KEY, with the reason of each.
        codecs: How many samples each codec has.
    """

    shards: ShardSet
    rejected: tuple[Rejection, ...]
    codecs: Counter[str]


def index(config: IndexConfig) -> IndexSummary:
    """Indexes tars; shows progress and a closing table on standard error.

    Raises:
        Refused: Bad options or input; a folder that holds another index or cannot be written; nothing to index.
        TubeletError: A tar cannot be read any more.
        OSError: The disk is full.
        KeyboardInterrupt: Ctrl-C was pressed. Nothing was written.
    """
    config.validate()
    names = read_classes(config.classes) if config.classes is not None else None
    paths = find_tars(config.tars)
    out = _folder_of_index(config)
    check_folder(out, paths)
    rejected: list[Rejection] = []
    with WorkerPool(index_task, config.jobs or len(os.sched_getaffinity(0))) as pool:
        scanned = _scan(pool, paths, config, rejected)
        classes = _number_classes(scanned, names)
        tars, codecs = _read_videos(pool, scanned, classes, config, rejected)
    if not tars:
        first = f"{rejected[0].source}: {rejected[0].reason}" if rejected else "no file in them"
        raise Refused(f"{config.tars[0]}: no sample of {len(paths)} tars can be indexed ({first}); check the tars")
    write_index(out, tars, classes or (), rejected)
    summary = IndexSummary(ShardSet.open(out), tuple(rejected), codecs)
    show_index(summary)
    return summary


def find_tars(given: Sequence[str]) -> list[Path]:
    """Returns the tars themselves, or those of a folder sorted by name.

    Raises:
        Refused: One is missing, or the folder holds none.
    """
    paths: list[Path] = []
    for path in map(Path, given):
        if os.path.isdir(path):
            inside = sorted(tar for tar in path.glob("*.tar") if not tar.name.startswith("."))
            if not inside:
                others = ", ".join(sorted(other.name for other in path.glob("*.t*"))[:3])
                found = f" (but {others}; decompress what is compressed)" if others else ""
                raise Refused(f"{path}: holds no .tar file{found}; name a folder of WebDataset tars")
            paths += inside
        elif os.path.isfile(path):
            paths.append(path)
        else:
            raise Refused(f"{path}: no such file or folder; name a tar, or a folder of tars")
    if not paths:
        raise Refused("tars: nothing to index; name tars, or a folder of them")
    return paths


def _folder_of_index(config: IndexConfig) -> Path:
    if config.out is not None:
        return Path(config.out)
    if len(config.tars) == 1 and os.path.isdir(config.tars[0]):
        return Path(config.tars[0])
    raise Refused("out: is missing; tars named one by one need --out FOLDER for their index")


def show_index(summary: IndexSummary, console: Console | None = None) -> None:
    """Prints what was indexed, what was rejected and why, on standard error unless told otherwise."""
    console = console or Console(stderr=True)
    shards, rejected = summary.shards, summary.rejected
    table = Table("", "samples", "")
    table.columns[1].justify = "right"
    table.columns[2].overflow = "fold"
    classes = f"{len(shards.classes)} classes" if shards.labelled else "unlabelled"
    tars = counted(len(shards.shards), "tar")
    table.add_row("indexed", str(shards.samples), escape(f"{tars}, {classes}, in {shards.folder}"))
    for codec, count in summary.codecs.most_common():
        table.add_row("  of these", str(count), codec)
    table.add_row("rejected", str(len(rejected)), f"listed in {REJECTED_NAME}" if rejected else "")
    add_reasons(table, ((rejection.reason, rejection.source) for rejection in rejected))
    console.print(table)


def _scan(
    pool: WorkerPool, paths: list[Path], config: IndexConfig, rejected: list[Rejection]
) -> list[tuple[Path, ScannedTar]]:
    """Returns what each tar holds; without labels unless every sample that is left has one."""
    field = None if config.unlabelled else config.label_field or "cls"
    scanned: list[tuple[Path, ScannedTar]] = []
    with TaskProgress("scanning", len(paths), "tars", "samples rejected") as progress:
        for path, tar in zip(paths, pool.map(ScanTask(path, field) for path in paths), strict=True):
            if isinstance(tar, Died):
                tar = ScannedTar(0, rejected=(("", "reading its headers ended the process"),))
            assert isinstance(tar, ScannedTar)
            if tar.decompressor is not None:
                raise Refused(f"{path}: compressed, so no sample can be read by itself; `{tar.decompressor}` it first")
            rejected += [Rejection(f"{path.name}/{key}".rstrip("/"), reason) for key, reason in tar.rejected]
            scanned.append((path, tar))
            progress.advance(bad=len(tar.rejected))
    has_label = any(sample.label is not None for _, tar in scanned for sample in tar.samples)
    if not has_label and config.label_field is None:
        return scanned
    return [(path, _labelled(path, tar, str(field), rejected)) for path, tar in scanned]


def _labelled(path: Path, tar: ScannedTar, field: str, rejected: list[Rejection]) -> ScannedTar:
    """Returns a tar without the samples that have no label, which go on the list."""
    suffix = field.partition(".")[0]
    for sample in tar.samples:
        if sample.label is None:
            rejected.append(Rejection(f"{path.name}/{sample.key}", f"has no {suffix}, so no label"))
    return dataclasses.replace(tar, samples=tuple(sample for sample in tar.samples if sample.label is not None))


def _number_classes(scanned: list[tuple[Path, ScannedTar]], names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Returns the class names: the given ones, 0 .. the highest if all labels are integers, or else the labels sorted.

    Raises:
        Refused: A label is no class.
    """
    places: dict[str, str] = {}
    for path, tar in scanned:
        for sample in tar.samples:
            if sample.label is not None:
                places.setdefault(sample.label, f"{path}: sample {sample.key}")
    if not places:
        if names is not None:
            raise Refused("classes: given, but no sample has a label; drop it, or name the labels with --label-field")
        return None
    if names is None and not all(INTEGER.fullmatch(label) for label in places):
        return tuple(sorted(places))
    count = MAX_CLASSES if names is None else len(names)
    for label, place in places.items():
        if label not in (names or ()) and not (INTEGER.fullmatch(label) and 0 <= int(label) < count):
            what = "no class number" if names is None else f"none of the {count} classes"
            raise Refused(
                f"{place}: label {label!r} is {what}; mend it, name all --classes, or index with --unlabelled"
            )
    return names if names is not None else tuple(map(str, range(max(map(int, places)) + 1)))


def _read_videos(
    pool: WorkerPool,
    scanned: list[tuple[Path, ScannedTar]],
    classes: tuple[str, ...] | None,
    config: IndexConfig,
    rejected: list[Rejection],
) -> tuple[list[IndexedTar], Counter[str]]:
    """Returns what the index says of each tar that holds a sample, and how many samples each codec has."""
    numbers = {name: number for number, name in enumerate(classes or ())}
    tars, codecs = [], Counter[str]()
    with TaskProgress("indexing", sum(len(tar.samples) for _, tar in scanned), "samples") as progress:
        results = pool.map(_tasks(scanned, config))
        for path, tar in scanned:
            if not tar.samples:
                continue
            sha256 = next(results)
            if isinstance(sha256, UnreadableTar):
                raise TubeletError(f"{path}: {sha256.reason}; see whether its disk is still there, and index again")
            if not isinstance(sha256, str):
                raise Refused(f"{path}: reading it ended the process; see whether memory suffices, with fewer --jobs")
            indexed: list[tuple[FoundSample, int | None, IndexedVideo]] = []
            for sample, video in zip(tar.samples, itertools.islice(results, len(tar.samples)), strict=True):
                if isinstance(video, IndexedVideo):
                    label = None if sample.label is None else numbers.get(sample.label)
                    label = int(sample.label) if label is None and sample.label is not None else label
                    indexed.append((sample, label, video))
                    codecs[video.codec] += 1
                else:
                    died = f"crashes its decoder, or makes no progress for {config.stall_s:g} s"
                    reason = died if isinstance(video, Died) else str(video)
                    rejected.append(Rejection(f"{path.name}/{sample.key}", reason))
                progress.advance(bad=not isinstance(video, IndexedVideo))
            if indexed:
                tars.append(IndexedTar(path, tar.size_bytes, sha256, tuple(indexed)))
    return tars, codecs


def _tasks(scanned: list[tuple[Path, ScannedTar]], config: IndexConfig) -> Iterator[HashTask | VideoTask]:
    for path, tar in scanned:
        if tar.samples:
            yield HashTask(path)
        for sample in tar.samples:
            yield VideoTask(path, sample.offset, sample.size_bytes, config.decode, config.stall_s)
