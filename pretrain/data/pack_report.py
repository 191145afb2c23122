"""What came of a pack, and the table that tells it at the end."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain.data.pack_folder import REJECTED_NAME, PackFolder, Rejection, ShardRecord
from pretrain.data.pack_parts import Part
from pretrain.data.terminal import add_reasons, counted
from pretrain.errors import printable


@dataclasses.dataclass(frozen=True)
class PackSummary:
    """What came of a pack.

    Attributes:
        folder: Where the shards are.
        accepted: How many videos are in them.
        rejected: The others, with the reason of each.
        shards: How many shards there are.
        size_bytes: The size of all shards.
        classes: How many classes there are; 0 if unlabelled.
        ignored: Files in the source folder that are no videos by their suffix, or images beside videos.
        outside: A video that lies in no class folder, for which the others that do have no labels either.
        finished_before: Whether all of it was finished already, so that nothing was done.
        part: Which part of a pack in parts this is; None for a whole set.
    """

    folder: Path
    accepted: int
    rejected: tuple[Rejection, ...]
    shards: int
    size_bytes: int
    classes: int
    ignored: int = 0
    outside: str | None = None
    finished_before: bool = False
    part: Part | None = None


def summary_of_set(folder: PackFolder, finished_before: bool) -> PackSummary:
    """Returns what came of a pack whose set is finished.

    Raises:
        Refused: The set does not match its index, or the list of rejected videos is damaged.
    """
    shards, rejected = folder.result()
    return PackSummary(
        folder=folder.path,
        accepted=shards.samples,
        rejected=rejected,
        shards=len(shards.shards),
        size_bytes=sum(shard.bytes for shard in shards.shards),
        classes=len(shards.classes),
        finished_before=finished_before,
    )


def summary_of_part(
    folder: Path, part: Part, classes: int, records: Sequence[ShardRecord], finished_before: bool
) -> PackSummary:
    """Returns what came of a part, from the records of all its shards."""
    shards = [record.shard for record in records if record.shard is not None]
    return PackSummary(
        folder=folder,
        accepted=sum(shard.samples for shard in shards),
        rejected=tuple(rejection for record in records for rejection in record.rejected),
        shards=len(shards),
        size_bytes=sum(shard.bytes for shard in shards),
        classes=classes,
        finished_before=finished_before,
        part=part,
    )


def show_summary(summary: PackSummary, console: Console | None = None) -> None:
    """Prints what was accepted, what was rejected and why, on standard error unless told otherwise."""
    console = console or Console(stderr=True)
    rejected = summary.rejected
    lines = []
    if summary.finished_before:
        what = "these videos were" if summary.part is None else f"part {summary.part} was"
        lines.append(f"{summary.folder}: {what} packed before; nothing to do")
    if summary.part is not None:
        lines.append(f"part {summary.part} is finished; when all are, `tubelet merge {summary.folder}` makes the set")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = Table("", "videos", "")
    table.columns[1].justify = "right"
    table.columns[2].overflow = "fold"
    size = f"{counted(summary.shards, 'shard')}, {summary.size_bytes / 2**20:.1f} MiB, in {summary.folder}"
    table.add_row("accepted", str(summary.accepted), escape(size))
    listed = f"listed in {REJECTED_NAME}" + (" by the merge" if summary.part else "")
    table.add_row("rejected", str(len(rejected)), listed if rejected else "")
    add_reasons(table, ((rejection.reason, rejection.source) for rejection in rejected))
    unlabelled = f"unlabelled: {summary.outside} lies in no class folder" if summary.outside else "unlabelled"
    table.add_row("classes", str(summary.classes), "" if summary.classes else escape(printable(unlabelled)))
    if summary.ignored:
        table.add_row("ignored", str(summary.ignored), "no videos by their suffix, or images beside videos")
    console.print(table)
