"""The folder that a pack writes: which shards of its plan are finished, and the moment when the whole set is.

A shard is finished when its record lies in `.packing/`, after the tar and its index; the set is finished when
`index.json` lies beside the shards, after all else. Both come by rename, so a kill at any point leaves a folder that
either goes on or is complete. `pack.json` holds the plan's settings, against which a restart is checked.
"""

import contextlib
import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from pretrain.data.pack_plan import PackPlan, PlannedShard
from pretrain.data.shards import FORMAT_VERSION, INDEX_NAME, ShardEntry, ShardSet
from pretrain.errors import Refused
from pretrain.files import is_out_of_space, write_json, write_text

PLAN_NAME = "pack.json"
REJECTED_NAME = "rejected.jsonl"
WORK_NAME = ".packing"
DAMAGED = (ValueError, KeyError, TypeError)
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

    def check(self, plan: PackPlan) -> bool:
        """Returns whether the folder holds the finished shards of this plan.

        Raises:
            Refused: It holds something else, or shards of another plan, or cannot be read.
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
            return INDEX_NAME in names
        strangers = [name for name in names if not name.startswith((WORK_NAME, f"{PLAN_NAME}.tmp-"))]
        if strangers:
            raise Refused(f"{self.path}: holds {strangers[0]}, which no pack put there; name a new or empty folder")
        return False

    @contextlib.contextmanager
    def locked(self, plan: PackPlan) -> Iterator[None]:
        """Makes the folder this process's own, ready to take shards of the plan.

        Raises:
            Refused: Another process packs into it, or it cannot be written.
            OSError: The disk is full.
        """
        try:
            lock = self._lock()
        except BlockingIOError as error:
            raise Refused(f"{self.path}: another `tubelet pack` is writing there; wait for it or stop it") from error
        except OSError as error:
            if is_out_of_space(error):
                raise
            raise Refused(f"{self.path}: cannot be written ({error.strerror}); name another folder") from error
        with lock:
            for leftover in (*self.path.glob("*.tmp-*"), *self.work.glob("*.tmp-*")):
                leftover.unlink()
            if not (self.path / PLAN_NAME).exists():
                write_json(self.path / PLAN_NAME, plan.settings)
            yield

    def record(self, planned: PlannedShard) -> ShardRecord | None:
        """Returns what came of a planned shard; None if it is not finished.

        Raises:
            Refused: Its record is damaged.
        """
        path = self._record_path(planned)
        try:
            content = json.loads(path.read_text())
            shard = ShardEntry(**content["shard"]) if content["shard"] is not None else None
            record = ShardRecord(shard, tuple(Rejection(**entry) for entry in content["rejected"]))
        except FileNotFoundError:
            return None
        except DAMAGED as error:
            raise Refused(
                f"{path}: not the record of a shard ({error!r}); remove it, and the same command packs {planned.name} "
                "again"
            ) from error
        return record if shard is None or self._is_whole(shard) else None

    def commit(self, planned: PlannedShard, record: ShardRecord) -> None:
        """Records that a planned shard is finished."""
        write_json(self._record_path(planned), dataclasses.asdict(record))

    def finish(self, plan: PackPlan) -> None:
        """Writes the list of rejected videos and then `index.json`.

        Raises:
            Refused: No video was accepted; the folder is then as it was before.
        """
        records = [record for planned in plan.shards if (record := self.record(planned)) is not None]
        rejected = [rejection for record in records for rejection in record.rejected]
        shards = [record.shard for record in records if record.shard is not None]
        if not shards:
            self._abandon()
            first = f"{rejected[0].source}: {rejected[0].reason}"
            raise Refused(
                f"{plan.sources.root}: none of the {len(rejected)} videos can be packed ({first}); check the files"
            )
        if rejected:
            lines = (json.dumps(dataclasses.asdict(rejection)) + "\n" for rejection in rejected)
            write_text(self.path / REJECTED_NAME, "".join(lines))
        write_json(self.path / INDEX_NAME, _index(plan, shards))
        shutil.rmtree(self.work)

    def result(self) -> tuple[ShardSet, tuple[Rejection, ...]]:
        """Returns the finished shard set and the videos that are not in it.

        Raises:
            Refused: The set does not match its index, or the list of rejected videos is damaged.
        """
        path = self.path / REJECTED_NAME
        try:
            lines = path.read_text().splitlines() if path.exists() else []
            rejected = tuple(Rejection(**json.loads(line)) for line in lines)
        except DAMAGED as error:
            raise Refused(
                f"{path}: not a list of rejected videos ({error!r}); remove it, the shards do not need it"
            ) from error
        return ShardSet.open(self.path), rejected

    def finished_shards(self) -> int:
        """Returns how many planned shards have a record."""
        return len(list(self.work.glob("*.json")))

    def _lock(self) -> TextIO:
        """Opens and locks the file whose being open keeps other packs out."""
        self.work.mkdir(parents=True, exist_ok=True)
        lock = open(self.work / "lock", "w")  # noqa: SIM115 (the caller closes it)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise
        return lock

    def _record_path(self, planned: PlannedShard) -> Path:
        return self.work / f"{planned.name}.json"

    def _is_whole(self, shard: ShardEntry) -> bool:
        path, index_path = self.path / shard.name, self.path / shard.index_name
        return path.is_file() and path.stat().st_size == shard.bytes and index_path.is_file()

    def _compare(self, plan: PackPlan) -> None:
        path = self.path / PLAN_NAME
        remedy = f"name another folder, or remove {self.path} and pack again"
        try:
            before = {**json.loads(path.read_text())}
        except (OSError, *DAMAGED) as error:
            raise Refused(f"{path}: cannot be read ({error}); {remedy}") from error
        for name, now in plan.settings.items():
            if before.get(name) == now:
                continue
            if name == "videos_sha256":
                raise Refused(
                    f"{self.path}: packed from videos that have changed since (paths, labels or sizes); {remedy}"
                )
            raise Refused(f"{self.path}: packed with {name} {before.get(name)}, now {now}; {remedy}")

    def _abandon(self) -> None:
        shutil.rmtree(self.work)
        (self.path / PLAN_NAME).unlink()
        with contextlib.suppress(OSError):  # not ours alone
            self.path.rmdir()


def _index(plan: PackPlan, shards: list[ShardEntry]) -> dict[str, Any]:
    frame_rate = plan.settings["fps"]
    return {
        "format_version": FORMAT_VERSION,
        "classes": list(plan.sources.classes),
        "frame_rate": frame_rate,
        "short_side": plan.settings["short_side"],
        "resampled": frame_rate is not None,
        "samples": sum(shard.samples for shard in shards),
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
