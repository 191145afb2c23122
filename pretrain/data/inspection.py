"""`tubelet inspect`: what a shard set holds, from its indexes alone, and a picture of it.

No tar is read for the figures; the picture (`contact_sheet.py`) decodes one frame of each sample that it shows.
"""

import dataclasses
import itertools
import os
import statistics
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain.data.contact_sheet import MAX_SAMPLES, contact_sheet
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.shards import ShardSet
from pretrain.errors import Refused
from pretrain.files import is_out_of_space, replacing

MAX_VALUES = 5
"""Sizes and frame rates that are told by name; the rarer ones are counted together."""
BAR = 24
"""Characters of the longest bar."""


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """What to inspect, and the picture to draw of it."""

    shards: str
    """Folder of shards, written by `tubelet pack` or `tubelet index`, or its URL."""
    out: str | None = None
    """PNG file for a contact sheet; by default none is drawn."""
    samples: int = 48
    """Samples in the contact sheet, at most."""
    seed: int = 0
    """Chooses the samples of the contact sheet."""
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    """Where shards from a URL are kept."""

    def validate(self) -> None:
        """Raises `Refused` for what cannot be drawn, and for numbers that cannot be."""
        self.cache.validate("cache")
        if not 1 <= self.samples <= MAX_SAMPLES:
            raise Refused(f"samples: {self.samples} does not do; use 1 to {MAX_SAMPLES}")
        if self.seed < 0:
            raise Refused(f"seed: {self.seed} does not do; use 0 or more")
        if self.out is None:
            return
        if Path(self.out).suffix.lower() != ".png":
            raise Refused(f"out: {self.out} is no PNG by its name; end it with .png")
        if os.path.isdir(self.out) or not os.path.isdir(Path(self.out).absolute().parent):
            raise Refused(f"out: {self.out} cannot be written; name a file in a folder that exists")


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What the indexes of a set tell.

    Attributes:
        samples: How many there are.
        classes: How many samples each class has, in the order of class numbers; empty if unlabelled.
        durations_s: The length of each sample in seconds.
        frame_rates: How many samples have each number of frames per second.
        sizes: How many samples have each (width, height) in pixels; empty if the indexes do not tell.
        size_bytes: The size of all shards.
        splits: How many samples each split has that packing noted.
    """

    samples: int
    classes: tuple[int, ...]
    durations_s: tuple[float, ...]
    frame_rates: Counter[float]
    sizes: Counter[tuple[int, int]]
    size_bytes: int
    splits: Counter[str]


def inspect(config: InspectConfig) -> Inspection:
    """Prints what a shard set holds, on standard output, and draws a contact sheet if asked for one.

    Raises:
        Refused: Bad options, the folder is no set of shards, or the picture cannot be written.
        OSError: The disk is full.
    """
    config.validate()
    shards = ShardSet.open(config.shards, cache=config.cache)
    if config.out is not None:
        _draw(shards, config, Path(config.out))
    inspection = read_indexes(shards)
    show_inspection(shards, inspection)
    return inspection


def read_indexes(shards: ShardSet) -> Inspection:
    """Returns what the `.idx` files of a set tell."""
    labels: Counter[int] = Counter()
    durations_s: list[float] = []
    frame_rates: Counter[float] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    for number in range(len(shards.shards)):
        index = shards.shard_index(number)
        labels.update(index.labels or itertools.chain(*(index.label_lists or ())))
        durations_s += [frames / rate for frames, rate in zip(index.frames, index.frame_rates, strict=True)]
        frame_rates.update(index.frame_rates)
        sizes.update(zip(index.widths or (), index.heights or (), strict=True))
    return Inspection(
        samples=shards.samples,
        classes=tuple(labels[number] for number in range(len(shards.classes))),
        durations_s=tuple(durations_s),
        frame_rates=frame_rates,
        sizes=sizes,
        size_bytes=sum(shard.bytes for shard in shards.shards),
        splits=Counter(name for names in shards.splits() for name in names.split()),
    )


def show_inspection(shards: ShardSet, inspection: Inspection, console: Console | None = None) -> None:
    """Prints what a set holds, on standard output unless told otherwise."""
    console = console or Console()
    durations_s = inspection.durations_s
    table = Table.grid(padding=(0, 2))
    table.add_row("shards", f"{len(shards.shards)}, {_shown_bytes(inspection.size_bytes)}")
    table.add_row("samples", str(inspection.samples))
    several = ", of which a sample has any number" if shards.multi_label else ""
    table.add_row("classes", f"{len(shards.classes)}{several}" if shards.labelled else "none: unlabelled")
    if inspection.splits:
        table.add_row("splits", ", ".join(f"{name} {count}" for name, count in sorted(inspection.splits.items())))
    shortest, median, longest = min(durations_s), statistics.median(durations_s), max(durations_s)
    table.add_row("duration", f"{shortest:.2f} s to {longest:.2f} s, median {median:.2f} s")
    table.add_row("in all", _shown_time(sum(durations_s)))
    rates = Counter({f"{rate:g}": count for rate, count in inspection.frame_rates.items()})
    table.add_row("frames per second", _shares(rates))
    sizes = Counter({f"{width} x {height}": count for (width, height), count in inspection.sizes.items()})
    table.add_row("width x height", _shares(sizes) if sizes else "not in the index: it was written before sizes were")
    console.print(escape(str(shards.folder)), style="bold", highlight=False)
    console.print(table, highlight=False)
    console.print(f"fingerprint        {shards.fingerprint}", highlight=False, soft_wrap=True)
    if shards.labelled:
        console.print()
        console.print(_table_of_classes(shards.classes, inspection.classes), highlight=False)


def _draw(shards: ShardSet, config: InspectConfig, path: Path) -> None:
    sheet = contact_sheet(shards, config.samples, config.seed)
    try:
        with replacing(path) as temporary:
            sheet.save(temporary, format="PNG", optimize=True)
    except OSError as error:
        if is_out_of_space(error):
            raise
        raise Refused(f"out: {path} cannot be written ({error.strerror}); name another file") from error


def _table_of_classes(names: tuple[str, ...], counts: tuple[int, ...]) -> Table:
    table = Table("class", "name", "samples", "")
    for column in (0, 2):
        table.columns[column].justify = "right"
    most = max(max(counts), 1)
    for number, (name, count) in enumerate(zip(names, counts, strict=True)):
        table.add_row(str(number), escape(name), str(count), "█" * round(BAR * count / most))
    return table


def _shares(counts: Counter[str]) -> str:
    """Tells the most frequent values, each with how many samples have it."""
    if len(counts) == 1:
        return f"{next(iter(counts))} in all"
    told = [f"{value} in {count}" for value, count in counts.most_common(MAX_VALUES)]
    others = len(counts) - len(told)
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(MAX_VALUES))
    return ", ".join([*told, f"{others} others in {rest}"] if others else told)


def _shown_bytes(size_bytes: int) -> str:
    value, unit = size_bytes / 2**20, "MiB"
    for larger in ("GiB", "TiB"):
        if value >= 1024:
            value, unit = value / 1024, larger
    return f"{value:.1f} {unit}"


def _shown_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
