"""The folder that a pack writes: which shards of its plan are finished, and the moment when the whole set is.

A shard is finished when its record lies in `.packing/`, after the tar and its index; the set is finished when
`index.json` lies beside the shards, after all else. Both come by rename, so a kill at any point leaves a folder that
either goes on or is complete. `pack.json` holds the plan's settings, against which a restart, and every part of a pack
in parts, is checked.

Locks are files in `.packing/`. A part shares `lock` with the other parts and has its own besides; what writes the
whole set, a pack in one piece or a merge, has `lock` alone.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from pretrain.data.pack_parts import Part, listed
from pretrain.data.pack_plan import PackPlan, shard_names
from pretrain.data.shards import INDEX_NAME, ShardEntry, ShardSet
from pretrain.errors import Refused
from pretrain.files import is_out_of_space, write_json, write_text, write_text_once

PLAN_NAME = "pack.json"
REJECTED_NAME = "rejected.jsonl"
WORK_NAME = ".packing"
PARTS_NAME = "parts"
NEEDED_TO_MERGE = ("format_version", "videos", "samples_per_shard", "classes", "fps", "short_side")
DAMAGED = (ValueError, KeyError, TypeError, RecursionError)
"""What reading a damaged file of JSON raises."""


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A video that is in no shard: its path as the shards would name it, and why."""

    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """What came of a planned shard: its entry for `index.json` (None if no video was accepted) and the rejected."""

    shard: ShardEntry | None
    rejected: tuple[Rejection, ...]


class PackFolder:
    """The output folder of a pack."""

    def __init__(self, path: Path) -> None:
        """Takes the folder's path; nothing is read or written yet."""
        self.path = path
        self.work = path / WORK_NAME

    def check(self, plan: PackPlan, part: Part | None = None) -> bool:
        """Returns whether the folder holds the finished shards of this plan.

        Raises:
            Refused: It holds something else, or shards of another plan or of another number of parts, or cannot be
                read.
        """
        try:
            names = sorted(entry.name for entry in self.path.iterdir())
        except FileNotFoundError:
            return False
        except NotADirectoryError as error:
            raise Refused(f"{self.path}: not a folder; name another one for the shards") from error
        except OSError as error:
            raise Refused(f"{self.path}: cannot be read ({error.strerror}); name another folder") from error
        if PLAN_NAME in names:
            self._compare(plan)
            if INDEX_NAME in names:
                return True
            self._compare_parts(part)
            return False
        strangers = [name for name in names if not name.startswith((WORK_NAME, f"{PLAN_NAME}.tmp-"))]
        if strangers:
            raise Refused(f"{self.path}: holds {strangers[0]}, which no pack put there; name a new or empty folder")
        return False

    def is_finished(self) -> bool:
        """Returns whether the folder holds a whole set."""
        return (self.path / INDEX_NAME).exists()

    @contextlib.contextmanager
    def taking(self, plan: PackPlan, part: Part | None) -> Iterator[None]:
        """Makes the shards of a part, or of the whole plan, this process's own to write.

        Raises:
            Refused: Another process writes them, the folder was begun with another plan or another number of parts
                meanwhile, or it cannot be written.
            OSError: The disk is full.
        """
        with self._locked(part):
            if not self.is_finished():
                write_text_once(self.path / PLAN_NAME, json.dumps(plan.settings, indent=2) + "\n")
                write_text_once(self.work / PARTS_NAME, f"{part.parts if part else 1}\n")
                self.check(plan, part)
                shards = plan.shards if part is None else part.share(plan.shards)
                self._remove_leftovers(None if part is None else {planned.name for planned in shards})
            yield

    @contextlib.contextmanager
    def merging(self) -> Iterator[None]:
        """Keeps all packs out of the folder.

        Raises:
            Refused: A process packs into it, or it cannot be written.
            OSError: The disk is full.
        """
        with self._locked(None):
            self._remove_leftovers(None)
            yield

    def record(self, name: str) -> ShardRecord | None:
        """Returns what came of a planned shard; None if it is not finished.

        Raises:
            Refused: Its record is damaged.
        """
        path = self._record_path(name)
        try:
            content = json.loads(path.read_text())
            shard = ShardEntry(**content["shard"]) if content["shard"] is not None else None
            record = ShardRecord(shard, tuple(Rejection(**entry) for entry in content["rejected"]))
            return record if shard is None or self._is_whole(shard) else None
        except FileNotFoundError:
            return None
        except DAMAGED as error:
            raise Refused(
                f"{path}: not the record of a shard ({error!r}); remove it, and the same command packs {name} again"
            ) from error

    def commit(self, name: str, record: ShardRecord) -> None:
        """Records that a planned shard is finished."""
        write_json(self._record_path(name), dataclasses.asdict(record))

    def settings(self) -> dict[str, Any]:
        """Returns the settings of the plan that the folder was begun with.

        Raises:
            Refused: There are none, or they are damaged.
        """
        path = self.path / PLAN_NAME
        try:
            settings = json.loads(path.read_text())
            shard_names(settings["videos"], settings["samples_per_shard"])
            told = {"multi_label": True} if settings.get("multi_label") else {}
            return {name: settings[name] for name in NEEDED_TO_MERGE} | told
        except (FileNotFoundError, NotADirectoryError) as error:
            remedy = "pack into it with `tubelet pack VIDEOS SHARDS --part I/N` first"
            raise Refused(f"{self.path}: holds no {PLAN_NAME}, so no pack was begun there; {remedy}") from error
        except OSError as error:
            raise Refused(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
        except (ArithmeticError, *DAMAGED) as error:
            remedy = f"remove {self.path} and pack again"
            raise Refused(f"{path}: not the settings of a pack ({error}); {remedy}") from error

    def refuse_unfinished(self, settings: dict[str, Any]) -> None:
        """Raises `Refused`, naming the parts, if a shard of the plan is not finished."""
        names = shard_names(settings["videos"], settings["samples_per_shard"])
        missing = [number for number, name in enumerate(names) if self.record(name) is None]
        parts = self._parts() or 1
        if missing and parts == 1:
            left = f"{len(missing)} of {len(names)} shards are not finished"
            raise Refused(f"{self.path}: {left}; run the same `tubelet pack` again to go on")
        if missing:
            unfinished = listed({number % parts for number in missing})
            raise Refused(
                f"{self.path}: of {parts} parts, {unfinished} {'is' if unfinished.isdigit() else 'are'} not finished; "
                f"run `tubelet pack` with --part I/{parts} for each of them (sbatch --array={unfinished}), then merge"
            )

    def finish(self, settings: dict[str, Any]) -> None:
        """Writes the list of rejected videos and then `index.json`.

        Raises:
            Refused: A shard is not finished; or no video was accepted, and the folder is then as it was before.
        """
        self.refuse_unfinished(settings)
        names = shard_names(settings["videos"], settings["samples_per_shard"])
        records = [record for name in names if (record := self.record(name)) is not None]
        rejected = [rejection for record in records for rejection in record.rejected]
        shards = [record.shard for record in records if record.shard is not None]
        if not shards:
            # The plan last: without it, what is left would pass for the records of the next pack.
            for path in (self.work / PARTS_NAME, *map(self._record_path, names)):
                path.unlink(missing_ok=True)
            (self.path / PLAN_NAME).unlink()
            first = f"{rejected[0].source}: {rejected[0].reason}"
            raise Refused(f"{self.path}: none of the {len(rejected)} videos can be packed ({first}); check the files")
        if rejected:
            lines = (json.dumps(dataclasses.asdict(rejection)) + "\n" for rejection in rejected)
            write_text(self.path / REJECTED_NAME, "".join(lines))
        write_json(self.path / INDEX_NAME, _index(settings, shards))

    def result(self) -> tuple[ShardSet, tuple[Rejection, ...]]:
        """Returns the finished shard set and the videos that are not in it; removes what packing left behind.

        Raises:
            Refused: The set does not match its index, or the list of rejected videos is damaged.
        """
        shutil.rmtree(self.work, ignore_errors=True)
        path = self.path / REJECTED_NAME
        try:
            lines = path.read_text().splitlines() if path.exists() else []
            rejected = tuple(Rejection(**json.loads(line)) for line in lines)
        except DAMAGED as error:
            raise Refused(
                f"{path}: not a list of rejected videos ({error!r}); remove it, the shards do not need it"
            ) from error
        return ShardSet.open(self.path), rejected

    def finished_shards(self, names: Iterable[str]) -> int:
        """Returns how many of the planned shards have a record."""
        return sum(self._record_path(name).exists() for name in names)

    @contextlib.contextmanager
    def _locked(self, part: Part | None) -> Iterator[None]:
        """Holds the locks of a part, or that of the whole set, and removes `.packing/` when it is of no more use."""
        try:
            with contextlib.ExitStack() as locks:
                self.work.mkdir(parents=True, exist_ok=True)
                locks.enter_context(self._lock("lock", fcntl.LOCK_EX if part is None else fcntl.LOCK_SH))
                if part is not None:
                    locks.enter_context(self._lock(f"part-{part.number}.lock", fcntl.LOCK_EX))
                held = locks.pop_all()
        except BlockingIOError as error:
            whose = "" if part is None else f" of part {part}, or of all parts,"
            raise Refused(
                f"{self.path}: another `tubelet pack`{whose} is writing there; wait for it or stop it"
            ) from error
        except OSError as error:
            if is_out_of_space(error):
                raise
            raise Refused(f"{self.path}: cannot be written ({error.strerror}); name another folder") from error
        try:
            with held:
                yield
        finally:  # after the locks: a network file system keeps a file that is open, under another name
            if self.is_finished() or not (self.path / PLAN_NAME).exists():
                shutil.rmtree(self.work, ignore_errors=True)
                with contextlib.suppress(OSError):  # not ours alone
                    self.path.rmdir()

    def _lock(self, name: str, kind: int) -> TextIO:
        """Opens and locks a file of `.packing/`; the lock lasts as long as it is open."""
        lock = open(self.work / name, "a+")  # noqa: SIM115 (the caller closes it)
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise
        return lock

    def _remove_leftovers(self, names: set[str] | None) -> None:
        """Removes temporary files that a killed process left of the named shards, or of anything."""
        for leftover in (*self.path.glob("*.tmp-*"), *self.work.glob("*.tmp-*")):
            if names is None or leftover.name.partition(".")[0] + ".tar" in names:
                leftover.unlink(missing_ok=True)

    def _record_path(self, name: str) -> Path:
        return self.work / f"{name}.json"

    def _is_whole(self, shard: ShardEntry) -> bool:
        path, index_path = self.path / shard.name, self.path / shard.index_name
        return path.is_file() and path.stat().st_size == shard.bytes and index_path.is_file()

    def _parts(self) -> int | None:
        """In how many parts the folder is being packed; None if no process has said so yet."""
        path = self.work / PARTS_NAME
        try:
            parts = int(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            remedy = "stop all parts, remove it and start them again"
            raise Refused(f"{path}: not a number of parts ({error}); {remedy}") from error
        if parts < 1:
            raise Refused(f"{path}: {parts} is not a number of parts; stop all parts, remove it and start them again")
        return parts

    def _compare(self, plan: PackPlan) -> None:
        path = self.path / PLAN_NAME
        remedy = f"name another folder, or remove {self.path} and pack again"
        try:
            before = {**json.loads(path.read_text())}
        except (OSError, *DAMAGED) as error:
            raise Refused(f"{path}: cannot be read ({error}); {remedy}") from error
        for name, now in ({"multi_label": None} | plan.settings).items():
            if before.get(name) == now:
                continue
            if name == "videos_sha256":
                raise Refused(
                    f"{self.path}: packed from videos that have changed since (paths, labels or sizes); {remedy}"
                )
            differ = f"{name} {before.get(name)}, now {now}"
            if name == "classes":
                differ = f"other classes ({_first_difference(before.get(name), now)})"
            raise Refused(f"{self.path}: packed with {differ}; {remedy}")

    def _compare_parts(self, part: Part | None) -> None:
        before, now = self._parts(), part.parts if part else 1
        if before in (None, now):
            return
        shown = {parts: "one piece" if parts == 1 else f"{parts} parts" for parts in (before, now)}
        remedy = "leave out --part" if before == 1 else f"give --part I/{before}"
        raise Refused(
            f"{self.path}: packed in {shown[before]}, now in {shown[now]}; {remedy}, or remove {self.path} and pack "
            "again"
        )


def _first_difference(before: Any, now: list[str]) -> str:
    pairs = itertools.zip_longest(before if isinstance(before, list) else [], now)
    number, (one, other) = next((number, pair) for number, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"number {number} was {'none' if one is None else one}, now {'none' if other is None else other}"


def _index(settings: dict[str, Any], shards: list[ShardEntry]) -> dict[str, Any]:
    return {
        "format_version": settings["format_version"],
        "classes": settings["classes"],
        **({"multi_label": True} if settings.get("multi_label") else {}),
        "frame_rate": settings["fps"],
        "short_side": settings["short_side"],
        "resampled": settings["fps"] is not None,
        "samples": sum(shard.samples for shard in shards),
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
