"""What `tubelet pack` shows: a progress bar on a terminal, plain lines elsewhere, and a table at the end."""

import dataclasses
import re
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pretrain.data.pack_folder import REJECTED_NAME, Rejection

LINE_EVERY_S = 10.0
MAX_REASONS = 12


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


class PackProgress:
    """Tells how far a pack is, on standard error; use it as a context manager."""

    def __init__(self, videos: int, console: Console | None = None) -> None:
        """Takes the number of videos to pack."""
        self.videos, self.done, self.rejected = videos, 0, 0
        self.console = console or Console(stderr=True)
        self.started_s = self.told_s = time.monotonic()
        columns = (
            TextColumn("packing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("videos, {task.fields[rejected]} rejected"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("packing", total=videos, rejected=0)

    def __enter__(self) -> "PackProgress":
        """Shows the bar."""
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the bar away."""
        self.bar.stop()

    def resume(self, videos: int, rejected: int) -> None:
        """Counts videos that an earlier run finished."""
        self.done += videos
        self.rejected += rejected
        self.bar.update(self.task, completed=self.done, rejected=self.rejected)
        self.console.print(f"going on after {self.done} of {self.videos} videos, packed before", highlight=False)

    def advance(self, rejected: bool) -> None:
        """Counts one more video."""
        self.done += 1
        self.rejected += rejected
        self.bar.update(self.task, completed=self.done, rejected=self.rejected)
        now_s = time.monotonic()
        if not self.console.is_terminal and now_s - self.told_s >= LINE_EVERY_S:
            self.told_s = now_s
            self.console.print(f"packed {self.done} of {self.videos} videos, {self.rejected} rejected", highlight=False)


def show_summary(summary: PackSummary, console: Console | None = None) -> None:
    """Prints what was accepted, what was rejected and why, on standard error unless told otherwise.

    Reasons that differ in their numbers only share a row.
    """
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
    groups: dict[str, list[Rejection]] = {}
    for rejection in rejected:
        groups.setdefault(re.sub(r"\d+(\.\d+)?", "N", rejection.reason), []).append(rejection)
    largest_first = sorted(groups.values(), key=len, reverse=True)
    for group in largest_first[:MAX_REASONS]:
        table.add_row("  of these", str(len(group)), escape(f"{group[0].reason} ({group[0].source})"))
    if len(largest_first) > MAX_REASONS:
        rest = sum(len(group) for group in largest_first[MAX_REASONS:])
        table.add_row("  of these", str(rest), "other reasons")
    if summary.ignored:
        table.add_row("ignored", str(summary.ignored), "no videos by their suffix, or images beside videos")
    console.print(table)
