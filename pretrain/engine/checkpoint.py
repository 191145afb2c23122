"""Checkpoints that are there whole or not at all.

    step-00001200.tmp-3/   every rank writes, syncs and hashes its own files; rank 0 compares the reports with what
                           must be there, writes manifest.json last and syncs
    step-00001200/         the rename is the commit; only then are older checkpoints pruned

Every rank writes at once, or copies its part into host memory and lets a thread write it while training goes on. The
order of things is the same: all ranks commit together, later, once all have written.

Which of them a run goes on from is decided in `checkpoint_search.py`.
"""

import dataclasses
import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from pretrain.engine.averaging import WeightAverage
from pretrain.engine.checkpoint_search import step_folders
from pretrain.engine.distributed import Processes
from pretrain.engine.failures import has_room, means_full_disk
from pretrain.engine.manifest import Saved, size_bytes, verify, write_manifest
from pretrain.engine.ownership import RunLock
from pretrain.engine.rank_files import OPTIMIZER, WEIGHTS, RankFiles, Written, zero_stage
from pretrain.engine.universal import (
    TAG,
    convert,
    find_converted,
    load_universal,
    remove_orphans,
    universal_folder,
)
from pretrain.errors import DiskFull, Refused, StoppedByRule, TubeletError
from pretrain.files import sync_file

logger = logging.getLogger(__name__)

PROBE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which stay."""

    every: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_last: int = 2
    """Newest checkpoints that stay."""
    keep_every: int | None = None
    """Steps between checkpoints that stay for good, a multiple of every; None keeps none for good."""
    background: bool = False
    """Write while training goes on, from a copy in host memory that takes as much of it as a rank's files take of the
    disk; the checkpoint of a run that ends is always written at once."""

    def validate(self) -> None:
        """Raises `Refused` for numbers below 1, and where nothing would ever be kept for good."""
        for name in ("every", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refused(f"checkpoint.{name}: {value} must be at least 1")
        if self.keep_every and self.keep_every % self.every:
            raise Refused(
                f"checkpoint.keep_every: {self.keep_every} is no multiple of checkpoint.every {self.every}; use "
                f"{-(-self.keep_every // self.every) * self.every}"
            )


class _InFlight(NamedTuple):
    """A save that is not committed yet."""

    temporary: Path
    final: Path
    step: int
    state: dict[str, Any]
    report: "Future[Written]"


class Checkpoints:
    """Writes and reads the checkpoints of a run.

    Args:
        folder: The run's `checkpoints/`.
        processes: All processes of the run.
        lock: The run's ownership, on rank 0; None elsewhere.
        config: Which checkpoints stay.
    """

    def __init__(self, folder: Path, processes: Processes, lock: RunLock | None, config: CheckpointConfig) -> None:
        """Removes what an interrupted save or conversion left behind."""
        self.folder = folder
        self.processes = processes
        self.lock = lock
        self.config = config
        self.files = RankFiles(processes)
        self._in_flight: _InFlight | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._whole: set[str] = set()  # names of folders that this process wrote or verified
        processes.on_main_only(self._remove_leftovers)

    def _remove_leftovers(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("*-*.tmp-*"):
            _remove(stale)

    def include(self, average: WeightAverage) -> None:
        """Lets checkpoints hold a moving average of the weights too, from the next one saved or loaded on."""
        self.files.average = average

    def refuse_without_room(self, first_bytes: int) -> None:
        """Raises `DiskFull` where one more checkpoint finds no room; every rank calls it.

        Args:
            first_bytes: What the first one will take; later ones take what the one before takes.
        """

        def refuse() -> None:
            before = step_folders(self.folder)
            needed = size_bytes(before[-1]) if before else first_bytes
            why = f"as {before[-1].name} takes" if before else "for weights and the optimiser's state"
            self._refuse_full_disk(f"{self.folder}: the next checkpoint", needed, why)

        self.processes.on_main_only(refuse)

    def save(self, step: int, model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        """Writes and commits the checkpoint of `step`, after the one in flight; every rank calls it.

        Raises:
            DiskFull: No space is left; the previous checkpoint is untouched.
            StoppedByRule: Another job has taken over the run.
            TubeletError: A rank failed to write, or a file is missing.
        """
        temporary, final = self._open(step)
        report: Future[Written] = Future()
        report.set_result(self.files.write(temporary, model, optimizer))
        self._in_flight = _InFlight(temporary, final, step, state, report)
        self.finish()

    def begin(self, step: int, model: nn.Module, optimizer: Any, state: dict[str, Any], more: Any = None) -> Any:
        """Copies the checkpoint of `step` and begins to write it, after the one in flight; every rank calls it.

        Returns:
            A copy of `more`, see `RankFiles.copy`.

        Raises:
            DiskFull: There is no room for it.
            TubeletError: As `save`, of the one in flight.
        """
        temporary, final = self._open(step)
        write, copied = self.files.copy(temporary, model, optimizer, more)
        self._in_flight = _InFlight(temporary, final, step, state, self._writer.submit(write))
        return copied

    @property
    def is_in_flight(self) -> bool:
        """Whether a save has begun that is not committed yet."""
        return self._in_flight is not None

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing left to write, be it that it failed."""
        return self._in_flight is None or self._in_flight.report.done()

    def finish(self) -> None:
        """Waits for the save in flight, if there is one, and commits it; every rank calls it; raises as `save`."""
        if self._in_flight is None:
            return
        saved, self._in_flight = self._in_flight, None
        reports = self.processes.gather_objects(saved.report.result())
        self.processes.on_main(lambda: self._commit(saved, reports))

    def _open(self, step: int) -> tuple[Path, Path]:
        """Returns the temporary folder of a step, which is there, and the final one."""
        self.finish()
        final = self.folder / f"step-{step:08d}"
        attempt = self.processes.gather_objects(self._attempt)[0]
        temporary = final.with_name(f"{final.name}.tmp-{attempt}")
        self.processes.on_main_only(lambda: self._make(temporary, final))
        return temporary, final

    @property
    def _attempt(self) -> int | None:
        return self.lock.owner.attempt if self.lock else None

    def _make(self, temporary: Path, final: Path) -> None:
        before = step_folders(self.folder)
        if before:
            needed = size_bytes(before[-1])
            self._refuse_full_disk(f"{final}:", needed, f"as {before[-1].name} takes")
        try:
            temporary.mkdir()
        except OSError as error:
            raise self._failure(error, final) from error

    def _refuse_full_disk(self, what: str, needed: int, why: str) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise DiskFull(
                f"{what} takes about {needed / 2**20:.1f} MiB, {why}, and no more than {free / 2**20:.1f} MiB are "
                f"free on the disk; free some and start again; the checkpoints before are whole"
            )

    def _commit(self, saved: _InFlight, reports: list[Written]) -> None:
        """Commits what all ranks wrote, or removes it and raises; runs on rank 0."""
        files: dict[str, Any] = {}
        try:
            for report in reports:
                if isinstance(report, Exception):
                    raise report
                files |= report
            self.files.check_complete(saved.temporary, files)
            for inner in (path for path in saved.temporary.rglob("*") if path.is_dir()):
                sync_file(inner)
            write_manifest(saved.temporary, saved.step, saved.state, files)
            self._rename(saved.temporary, saved.final)
        except Exception as error:
            raise self._undone(error, saved.temporary, saved.final) from error
        logger.info("saved %s", saved.final)
        self._whole.add(saved.final.name)
        self._prune(saved.final)

    def _rename(self, temporary: Path, final: Path) -> None:
        """Commits a folder, unless another job has taken over the run."""
        if self.lock and not self.lock.is_held():
            raise StoppedByRule(f"{self.lock.path}: another job has taken over this run; this one stops")
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync_file(self.folder)

    def _undone(self, error: Exception, temporary: Path, final: Path) -> TubeletError:
        """Removes what was written for `final` and returns what to tell of its failure."""
        failure = error if isinstance(error, TubeletError) else self._failure(error, final)
        shutil.rmtree(temporary, ignore_errors=True)
        return failure

    def _failure(self, error: Exception, folder: Path) -> TubeletError:
        """Returns what to tell of a failed write; torch.save does not say when no space was left, so it is tried."""
        if means_full_disk(error) or not has_room(self.folder, PROBE_BYTES):
            return DiskFull(
                f"{folder}: no space left on the disk; free some and start again; the checkpoints before are whole"
            )
        return TubeletError(f"{folder}: cannot be written: {error}; the checkpoints before it are whole")

    def _prune(self, newest: Path) -> None:
        """Removes older checkpoints once `keep_last` whole ones stay, but for those that stay for good.

        Damaged ones and those of later steps do not count, and the newest whole one is never removed.
        """
        kept = 0
        for folder in reversed([folder for folder in step_folders(self.folder) if folder.name <= newest.name]):
            if kept < self.config.keep_last:
                kept += self._is_whole(folder)
                continue
            if self.config.keep_every and int(folder.name.removeprefix("step-")) % self.config.keep_every == 0:
                continue
            _remove(folder)
        remove_orphans(self.folder)

    def _is_whole(self, folder: Path) -> bool:
        if folder.name not in self._whole:
            try:
                self._whole.add(verify(folder).folder.name)
            except Refused:
                return False
        return True

    def load(self, saved: Saved, model: Any, optimizer: Any) -> None:
        """Puts a checkpoint's weights and optimiser state in place.

        What the configuration says of the optimiser (decay, betas, the layers' rates) stays as it is now. ZeRO's parts
        are converted first if as many processes as now did not write them.

        Raises:
            Refused: It holds another model, or was written by another kind of engine.
            DiskFull: There is no room for its conversion.
            TubeletError: It cannot be converted.
        """
        refuse_other_engine(saved, self.processes)
        converted = None if fits_this_world(saved, self.processes) else self._converted(saved)
        configured = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        try:
            if converted:
                load_universal(model, converted)
            elif self.processes.uses_deepspeed:
                model.load_checkpoint(saved.folder, tag=TAG)
            else:
                self.processes.accelerator.unwrap_model(model).load_state_dict(load_file(saved.folder / WEIGHTS))
                stored = torch.load(saved.folder / OPTIMIZER, map_location="cpu", weights_only=True)
                optimizer.load_state_dict(stored["optimizer"])
                if stored["scaler"] and self.processes.accelerator.scaler:
                    self.processes.accelerator.scaler.load_state_dict(stored["scaler"])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()
            raise Refused(
                f"{saved.folder}: holds another model than the configuration describes ({' '.join(reason[:2])}); "
                f"start with the configuration that wrote it or another --out"
            ) from None
        for group, values in zip(optimizer.param_groups, configured, strict=True):
            group.update(values)
        if self.files.average:
            self.files.average.load(saved.folder)
        if saved.folder.parent == self.folder:
            self._whole.add(saved.folder.name)

    def _converted(self, saved: Saved) -> Path:
        """Returns the checkpoint in DeepSpeed's universal format, which rank 0 makes once while the others wait."""
        final = universal_folder(self.folder, saved.step)
        self.processes.on_main_patiently(lambda: self._convert(saved, final))
        return final

    def _convert(self, saved: Saved, final: Path) -> None:
        if find_converted(final, saved):
            return
        logger.info(
            "converting %s, which %d processes wrote, for %d",
            saved.folder,
            saved.state["engine"]["world"],
            self.processes.world,
        )
        self._refuse_full_disk(f"{final}:", 2 * size_bytes(saved.folder), "twice as much as the checkpoint")
        temporary = final.with_name(f"{final.name}.tmp-{self._attempt}")
        try:
            convert(saved, temporary)
            self._rename(temporary, final)
        except Exception as error:
            raise self._undone(error, temporary, final) from error


def _remove(folder: Path) -> None:
    """Removes a folder; what cannot be removed stays until the next time.

    That is what an attempt that has lost the run still writes, or a file that NFS keeps for somebody who reads it.
    """
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s cannot be removed now (%s)", folder, error)


def engine_kind(processes: Processes) -> dict[str, Any]:
    """Returns what must be alike to read a checkpoint as it is: undivided ones fit any world, ZeRO's only their own."""
    if not processes.uses_deepspeed:
        return {"name": "plain data parallelism", "world": "any number of"}
    return {"name": f"DeepSpeed ZeRO {zero_stage(processes)}", "world": processes.world}


def fits_this_world(saved: Saved, processes: Processes) -> bool:
    """Whether this number of processes can read a checkpoint as it is; only ZeRO 1 and above divide any of it."""
    divided = processes.uses_deepspeed and zero_stage(processes) > 0
    return not divided or saved.state["engine"]["world"] == processes.world


def refuse_other_engine(saved: Saved, processes: Processes) -> None:
    """Raises `Refused` if another kind of engine wrote a checkpoint; another number of processes is none."""
    here, there = engine_kind(processes), saved.state["engine"]
    if here["name"] != there["name"]:
        raise Refused(
            f"{saved.folder}: was written by {there['name']} with {there['world']} processes and cannot be read by "
            f"{here['name']} with {here['world']}; start with the same --deepspeed"
        )
