"""What the commands that go through many videos show: a progress bar on a terminal, plain lines elsewhere, a table."""

import re
import time
from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pretrain.errors import printable

LINE_EVERY_S = 10.0
MAX_REASONS = 12


class TaskProgress:
    """Tells how far a command is, on standard error; use it as a context manager."""

    def __init__(
        self, doing: str, total: int, unit: str = "videos", bad: str = "rejected", console: Console | None = None
    ) -> None:
        """Takes what is being done ("packing"), to how many of what, and what the bad ones are called."""
        self.doing, self.total, self.unit, self.bad = doing, total, unit, bad
        self.done = self.bad_ones = 0
        self.console = console or Console(stderr=True)
        self.told_s = time.monotonic()
        columns = (
            TextColumn(doing),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit}, {{task.fields[bad_ones]}} {bad}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task(doing, total=total, bad_ones=0)

    def __enter__(self) -> "TaskProgress":
        """Shows the bar."""
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the bar away."""
        self.bar.stop()

    def resume(self, done: int, bad: int) -> None:
        """Counts what an earlier run finished."""
        self.done += done
        self.bad_ones += bad
        self.bar.update(self.task, completed=self.done, bad_ones=self.bad_ones)
        self.say(f"going on after {self.done} of {self.total} {self.unit}, finished before")

    def advance(self, bad: int = 0, by: int = 1) -> None:
        """Counts more of them, `bad` of which are bad."""
        self.done += by
        self.bad_ones += bad
        self.bar.update(self.task, completed=self.done, bad_ones=self.bad_ones)
        now_s = time.monotonic()
        if not self.console.is_terminal and now_s - self.told_s >= LINE_EVERY_S:
            self.told_s = now_s
            self.say(f"{self.doing}: {self.done} of {self.total} {self.unit}, {self.bad_ones} {self.bad}")

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        self.console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


def counted(number: int, what: str) -> str:
    """Returns a number of things in words: `1 shard`, `2 shards`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def add_reasons(table: Table, reasons: Iterable[tuple[str, str]]) -> None:
    """Adds a row of three columns for each reason: how many times it is given, and an example.

    Reasons that differ in their numbers only share a row; the most frequent come first.

    Args:
        table: The table.
        reasons: Each reason, and what it is given for.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for reason, subject in reasons:
        groups.setdefault(re.sub(r"\d+(\.\d+)?", "N", reason), []).append((reason, subject))
    largest_first = sorted(groups.values(), key=len, reverse=True)
    for group in largest_first[:MAX_REASONS]:
        table.add_row("  of these", str(len(group)), escape(printable(f"{group[0][0]} ({group[0][1]})")))
    if len(largest_first) > MAX_REASONS:
        rest = sum(len(group) for group in largest_first[MAX_REASONS:])
        table.add_row("  of these", str(rest), "other reasons")
