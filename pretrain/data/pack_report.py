"""What came of a pack, and the table that tells it at the end."""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain.data.pack_folder import REJECTED_NAME, Rejection
from pretrain.data.terminal import add_reasons


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
        finished_before: Whether the folder was complete already, so that nothing was done.
    """

    folder: Path
    accepted: int
    rejected: tuple[Rejection, ...]
    shards: int
    size_bytes: int
    classes: int
    ignored: int
    finished_before: bool = False


def show_summary(summary: PackSummary, console: Console | None = None) -> None:
    """Prints what was accepted, what was rejected and why, on standard error unless told otherwise."""
    console = console or Console(stderr=True)
    rejected = summary.rejected
    if summary.finished_before:
        console.print(
            f"{summary.folder}: these videos were packed before; nothing to do", highlight=False, markup=False
        )
    table = Table("", "videos", "")
    table.columns[1].justify = "right"
    table.columns[2].overflow = "fold"
    size = f"{summary.shards} shards, {summary.size_bytes / 2**20:.1f} MiB, in {summary.folder}"
    table.add_row("accepted", str(summary.accepted), escape(size))
    table.add_row("rejected", str(len(rejected)), f"listed in {REJECTED_NAME}" if rejected else "")
    add_reasons(table, ((rejection.reason, rejection.source) for rejection in rejected))
    if summary.ignored:
        table.add_row("ignored", str(summary.ignored), "no videos by their suffix, or images beside videos")
    console.print(table)
