"""`tubelet check`: reads a whole shard set and lists what is wrong with it.

Every byte is hashed, every sample is found in its tar where the index says, read as training reads it, and decoded.
Nothing is written or mended.
"""

import dataclasses
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain.data.check_worker import COPY_AGAIN, MAKE_AGAIN, Problem, SampleTask, TarTask, check_task
from pretrain.data.decode_check import DecodeName
from pretrain.data.pool import Died, WorkerPool, refuse_pool_options
from pretrain.data.remote import RemoteFolder
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.shard_index import INDEX_NAME, ShardEntry, ShardIndex
from pretrain.data.shards import ShardSet
from pretrain.data.terminal import TaskProgress, add_reasons
from pretrain.errors import DiskFull, TubeletError

DECODED = {
    "three": "first, middle and last frame decoded",
    "all": "all frames decoded",
    "none": "opened, no frame decoded",
}

Report = Callable[[Problem], None]


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """What to check, and how thoroughly."""

    shards: str
    """Folder of shards, written by `tubelet pack` or `tubelet index`, or its URL."""
    decode: DecodeName = "three"
    """Frames of each sample to decode: the first, middle and last one (three), all, or none."""
    jobs: int = 0
    """Processes that read and decode; 0 is one per core."""
    stall_s: float = 60
    """Seconds without progress after which a sample is given up."""
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    """Where shards from a URL are kept."""

    def validate(self) -> None:
        """Raises `Refused` for numbers that cannot be."""
        self.cache.validate("cache")
        refuse_pool_options(self.jobs, self.stall_s)


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Attributes:
        shards: How many shards the index names.
        samples: How many samples the index names.
        reached: How many of them were read; the others are in shards that are missing or without a usable index.
        size_bytes: The size of all shards that are there.
        problems: What is wrong.
    """

    shards: int
    samples: int
    reached: int
    size_bytes: int
    problems: tuple[Problem, ...]


def check(config: CheckConfig) -> CheckReport:
    """Checks a shard set; shows progress, a line for each problem and a closing table on standard error.

    Raises:
        Refused: Bad options, or the folder is no set of shards.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    config.validate()
    shards = ShardSet.open(config.shards, check_files=False, cache=config.cache)
    problems: list[Problem] = []
    reached = 0
    with TaskProgress("checking", shards.samples, "samples", "problems") as progress:

        def report(problem: Problem) -> None:
            problems.append(problem)
            progress.say(str(problem))
            progress.advance(bad=1, by=0)

        for problem in _problems_of_index(shards):
            report(problem)
        with WorkerPool(check_task, config.jobs or len(os.sched_getaffinity(0))) as pool:
            given, taken = itertools.tee(_tasks(shards, config, report))
            for task, result in zip(given, pool.map(taken), strict=True):
                for problem in _of_dead(task) if isinstance(result, Died) else result:
                    report(problem)
                if isinstance(task, SampleTask):
                    reached += 1
                    progress.advance()
    sizes = (_size_bytes(shards.folder, shard) or 0 for shard in shards.shards)
    checked = CheckReport(len(shards.shards), shards.samples, reached, sum(sizes), tuple(problems))
    show_report(config, shards, checked)
    return checked


def show_report(config: CheckConfig, shards: ShardSet, report: CheckReport, console: Console | None = None) -> None:
    """Prints what was checked, and what is wrong by kind, on standard error unless told otherwise."""
    console = console or Console(stderr=True)
    table = Table("", "count", "")
    table.columns[1].justify = "right"
    table.columns[2].overflow = "fold"
    table.add_row("shards", str(report.shards), escape(f"{report.size_bytes / 2**20:.1f} MiB, in {shards.folder}"))
    table.add_row("samples", str(report.reached), DECODED[config.decode])
    if report.reached < report.samples:
        left = "in shards that are missing or whose index cannot be used"
        table.add_row("not reached", str(report.samples - report.reached), left)
    table.add_row("problems", str(len(report.problems)), "listed above" if report.problems else "all is well")
    add_reasons(table, ((problem.reason, problem.subject) for problem in report.problems))
    console.print(table)
    console.print(f"fingerprint {shards.fingerprint}", highlight=False, soft_wrap=True)


def _tasks(shards: ShardSet, config: CheckConfig, report: Report) -> Iterator[TarTask | SampleTask]:
    """Yields what workers are to do, and reports what can be seen without them; the tar goes before its samples."""
    seen: set[str] = set()
    first = 0
    for number, entry in enumerate(shards.shards):
        size_bytes = _size_bytes(shards.folder, entry)
        reason = _reason_not_whole(shards.folder, entry, size_bytes)
        if reason is not None:
            report(Problem(entry.name, None, reason, COPY_AGAIN))
        index = _usable_index(shards, number, report)
        if index is not None:
            for problem in _problems_of_rows(shards, entry.name, index, seen):
                report(problem)
        if index is not None and size_bytes is not None and (reason is None or isinstance(shards.folder, Path)):
            if reason is None:
                yield TarTask(shards.folder, entry, index)
            for row, key in enumerate(index.keys):
                if index.video_offsets[row] + index.video_sizes[row] > size_bytes:
                    report(Problem(entry.name, key, "lies beyond the end of the tar", COPY_AGAIN))
                    continue
                size = (index.heights[row], index.widths[row]) if index.heights and index.widths else None
                yield SampleTask(shards.folder, first + row, entry.name, key, size, config.decode, config.stall_s)
        first += entry.samples


def _problems_of_index(shards: ShardSet) -> Iterator[Problem]:
    """Yields where `index.json` contradicts itself."""
    folder = shards.folder
    content = folder.read_index() if isinstance(folder, RemoteFolder) else (folder / INDEX_NAME).read_bytes()
    stated = json.loads(content).get("samples", shards.samples)
    if stated != shards.samples:
        reason = f"states {stated} samples, but its shards hold {shards.samples}"
        yield Problem(INDEX_NAME, None, reason, COPY_AGAIN)
    for name, count in Counter(shard.name for shard in shards.shards).items():
        if count > 1:
            yield Problem(INDEX_NAME, None, f"names {name} {count} times", MAKE_AGAIN)


def _usable_index(shards: ShardSet, number: int, report: Report) -> ShardIndex | None:
    """Returns the index of a shard, or reports why it cannot be used."""
    try:
        return shards.shard_index(number)
    except TubeletError as error:
        reason = str(error).partition(": ")[2].partition(";")[0]
    report(Problem(shards.shards[number].index_name, None, reason, COPY_AGAIN))
    return None


def _problems_of_rows(shards: ShardSet, name: str, index: ShardIndex, seen: set[str]) -> Iterator[Problem]:
    """Yields what is wrong with an index's rows; `seen` holds the keys of the shards before."""
    for key in index.keys:
        if key in seen:
            yield Problem(name, key, "its key stands twice in the set", MAKE_AGAIN)
        seen.add(key)
    for key_of_problem, reason in index.problems(len(shards.classes)):
        yield Problem(name, key_of_problem, reason, MAKE_AGAIN)


def _of_dead(task: TarTask | SampleTask) -> list[Problem]:
    """What is said of a task that ran out of time or killed its worker twice."""
    if isinstance(task, TarTask):
        reason = "reading it ended the process"
        return [Problem(task.entry.name, None, reason, "see whether memory suffices, with fewer --jobs")]
    reason = f"crashes its decoder, or makes no progress for {task.stall_s:g} s"
    return [Problem(task.file, task.key, reason, MAKE_AGAIN)]


def _size_bytes(folder: Path | RemoteFolder, entry: ShardEntry) -> int | None:
    """Returns the size of a tar, None where there is none; that of one behind a URL is checked when it is fetched."""
    if isinstance(folder, RemoteFolder):
        return entry.bytes
    path = folder / entry.name
    return path.stat().st_size if path.is_file() else None


def _reason_not_whole(folder: Path | RemoteFolder, entry: ShardEntry, size_bytes: int | None) -> str | None:
    """Returns why a tar cannot be all that its index says, or None; one behind a URL is fetched first."""
    if isinstance(folder, RemoteFolder):
        try:
            os.close(folder.open_shard(entry)[0])
        except DiskFull:
            raise
        except TubeletError as error:
            return str(error).partition(": ")[2].partition(";")[0]
    if size_bytes is None:
        return "missing"
    return None if size_bytes == entry.bytes else f"{size_bytes} bytes where {INDEX_NAME} says {entry.bytes}"
