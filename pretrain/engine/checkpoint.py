"""Checkpoints that are there whole or not at all.

    step-00001200.tmp-3/   every rank writes, syncs and hashes its own files; rank 0 compares the reports with what
                           must be there, writes manifest.json last and syncs
    step-00001200/         the rename is the commit; only then are older checkpoints pruned

Resuming takes the newest folder whose manifest verifies and says why it passed over others. A folder that holds
checkpoints of which none can be read is an error, never a fresh start.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pretrain.engine.distributed import Processes
from pretrain.engine.failures import has_room, means_full_disk
from pretrain.engine.ownership import RunLock
from pretrain.errors import DiskFull, Refused, StoppedByRule, TubeletError
from pretrain.files import sha256_of_file, sync_file, write_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROBE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which stay."""

    every: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_last: int = 2
    """Newest checkpoints that stay."""

    def validate(self) -> None:
        """Raises `Refused` for numbers below 1."""
        for name in ("every", "keep_last"):
            if getattr(self, name) < 1:
                raise Refused(f"checkpoint.{name}: {getattr(self, name)} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint whose manifest verified.

    Attributes:
        folder: Where it is.
        step: Steps done when it was written.
        state: What the run noted beside the weights.
    """

    folder: Path
    step: int
    state: dict[str, Any]


class Checkpoints:
    """Writes and reads the checkpoints of a run.

    Args:
        folder: The run's `checkpoints/`.
        processes: All processes of the run.
        lock: The run's ownership, on rank 0; None elsewhere.
        keep_last: Newest checkpoints that stay.
    """

    def __init__(self, folder: Path, processes: Processes, lock: RunLock | None, keep_last: int) -> None:
        """Removes what an interrupted save left behind."""
        self.folder = folder
        self.processes = processes
        self.lock = lock
        self.keep_last = keep_last
        self._whole: set[str] = set()  # names of folders that this process wrote or verified
        processes.on_main_only(self._remove_leftovers)

    def _remove_leftovers(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("step-*.tmp-*"):
            shutil.rmtree(stale)

    def save(self, step: int, model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        """Writes and commits the checkpoint of `step`; every rank calls it.

        Raises:
            DiskFull: No space is left; the previous checkpoint is untouched.
            StoppedByRule: Another job has taken over the run.
            TubeletError: A rank failed to write, or a file is missing.
        """
        final = self.folder / f"step-{step:08d}"
        attempt = self.processes.gather_objects(self.lock.owner.attempt if self.lock else None)[0]
        temporary = final.with_name(f"{final.name}.tmp-{attempt}")
        self.processes.on_main_only(lambda: self._make(temporary, final))
        reports = self.processes.gather_objects(self._write_own_files(temporary, model, optimizer))
        self.processes.on_main(lambda: self._commit(temporary, final, reports, step, state))

    def _make(self, temporary: Path, final: Path) -> None:
        try:
            temporary.mkdir()
        except OSError as error:
            raise self._failure(error, final) from error

    def _write_own_files(self, folder: Path, model: nn.Module, optimizer: Any) -> dict[str, Any] | Exception:
        """Returns size and hash of each file this rank wrote, or the error that stopped it."""
        try:
            if self.processes.uses_deepspeed:
                _save_with_deepspeed(model, folder)
            elif self.processes.is_main:
                save_file(self.processes.accelerator.unwrap_model(model).state_dict(), folder / "model.safetensors")
                scaler = self.processes.accelerator.scaler
                torch.save(
                    {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None},
                    folder / "optimizer.pt",
                )
            own = [path for path in folder.rglob("*") if path.is_file() and self._is_own(path.name)]
            report = {}
            for path in own:
                sync_file(path)
                report[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
            return report
        except Exception as error:  # any failure of any library must reach rank 0, or the other ranks wait for ever
            return error

    def _is_own(self, name: str) -> bool:
        """DeepSpeed names what a rank wrote after it; all else is rank 0's."""
        if "zero_pp_rank_" in name:
            return f"zero_pp_rank_{self.processes.rank}_" in name
        return self.processes.is_main

    def _commit(self, temporary: Path, final: Path, reports: list[Any], step: int, state: dict[str, Any]) -> None:
        """Commits what all ranks wrote, or removes it and raises; runs on rank 0."""
        try:
            for report in reports:
                if isinstance(report, Exception):
                    raise report
            files = {name: entry for report in reports for name, entry in report.items()}
            self._check_complete(temporary, files)
            manifest = {"format": FORMAT_VERSION, "step": step, "state": state, "files": dict(sorted(files.items()))}
            write_json(temporary / MANIFEST, manifest | {"sha256": _sha256_of(manifest)})
            if self.lock and not self.lock.is_held():
                raise StoppedByRule(f"{self.lock.path}: another job has taken over this run; this one stops")
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            sync_file(self.folder)
        except TubeletError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        except Exception as error:
            failure = self._failure(error, final)
            shutil.rmtree(temporary, ignore_errors=True)
            raise failure from error
        logger.info("saved %s", final)
        self._whole.add(final.name)
        self._prune(final)

    def _failure(self, error: Exception, folder: Path) -> TubeletError:
        """Returns what to tell of a failed write; torch.save does not say when no space was left, so it is tried."""
        if means_full_disk(error) or not has_room(self.folder, PROBE_BYTES):
            return DiskFull(
                f"{folder}: no space left on the disk; free some and start again; the checkpoints before are whole"
            )
        return TubeletError(f"{folder}: cannot be written: {error}; the checkpoints before it are whole")

    def _check_complete(self, folder: Path, files: dict[str, Any]) -> None:
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        if there != set(files):
            raise TubeletError(f"{folder}: {sorted(there ^ set(files))} were not reported by the rank that owns them")
        for rank, needed in self._needed():
            if not any(all(part in name for part in needed) for name in files):
                raise TubeletError(f"{folder}: rank {rank} left no file named like {'*'.join(needed)}")

    def _needed(self) -> list[tuple[int, tuple[str, ...]]]:
        """What must be in a checkpoint: parts of file names, each with the rank that writes it."""
        if not self.processes.uses_deepspeed:
            return [(0, ("model.safetensors",)), (0, ("optimizer.pt",))]
        needed: list[tuple[int, tuple[str, ...]]] = [(0, ("model_states.pt",))]
        if zero_stage(self.processes) > 0:
            needed += [(rank, (f"zero_pp_rank_{rank}_", "optim_states.pt")) for rank in range(self.processes.world)]
        return needed

    def _prune(self, newest: Path) -> None:
        """Removes older checkpoints once `keep_last` whole ones stay; damaged ones and those of later steps count not.

        What cannot be removed, such as a file that NFS keeps for somebody who reads it, stays until the next time.
        """
        kept = 0
        for folder in reversed([folder for folder in step_folders(self.folder) if folder.name <= newest.name]):
            if kept < self.keep_last:
                kept += self._is_whole(folder)
                continue
            try:
                shutil.rmtree(folder)
            except OSError as error:
                logger.warning("%s cannot be removed now (%s)", folder, error)

    def _is_whole(self, folder: Path) -> bool:
        if folder.name not in self._whole:
            try:
                self._whole.add(verify(folder).folder.name)
            except Refused:
                return False
        return True

    def load(self, saved: Saved, model: Any, optimizer: Any) -> None:
        """Puts a checkpoint's weights and optimiser state in place.

        What the configuration says of the optimiser (decay, betas, the layers' rates) stays as it is now.

        Raises:
            Refused: It holds another model, or was written by another kind of engine or world.
        """
        here, there = engine_kind(self.processes), saved.state["engine"]
        if here != there:
            raise Refused(
                f"{saved.folder}: was written by {there['name']} with {there['world']} processes and cannot be read by "
                f"{here['name']} with {here['world']}; start with the same --deepspeed and number of processes"
            )
        configured = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        try:
            if self.processes.uses_deepspeed:
                model.load_checkpoint(saved.folder, tag="deepspeed")
            else:
                self.processes.accelerator.unwrap_model(model).load_state_dict(
                    load_file(saved.folder / "model.safetensors")
                )
                stored = torch.load(saved.folder / "optimizer.pt", map_location="cpu", weights_only=True)
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
        if saved.folder.parent == self.folder:
            self._whole.add(saved.folder.name)


def _save_with_deepspeed(engine: Any, folder: Path) -> None:
    """Saves; a rank that fails joins the barrier at which DeepSpeed lets the others wait for it, else they wait on."""
    try:
        engine.save_checkpoint(folder, tag="deepspeed", save_latest=False)
    except Exception:
        if torch.distributed.get_world_size() > 1:
            torch.distributed.barrier()
        raise


def zero_stage(processes: Processes) -> int:
    """Returns the ZeRO stage in use."""
    return processes.accelerator.state.deepspeed_plugin.zero_stage


def engine_kind(processes: Processes) -> dict[str, Any]:
    """Returns what must be alike to read a checkpoint: plain files fit any world, ZeRO's parts only their own."""
    if not processes.uses_deepspeed:
        return {"name": "plain data parallelism", "world": "any number of"}
    return {"name": f"DeepSpeed ZeRO {zero_stage(processes)}", "world": processes.world}


def step_folders(folder: Path) -> list[Path]:
    """Returns the committed checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and ".tmp-" not in path.name)


def find_checkpoint(folder: Path, resume: str) -> Saved | None:
    """Finds the checkpoint to go on from.

    A run that was begun with `never` or from a named checkpoint goes on like any other when it is started again by the
    same command.

    Args:
        folder: The run's `checkpoints/`.
        resume: `auto` for the newest that verifies, `never` for none, or a checkpoint's folder.

    Returns:
        The checkpoint, or None where the run starts afresh.

    Raises:
        Refused: None of the checkpoints can be read, the named one cannot, or the start would bury existing ones.
    """
    candidates = step_folders(folder)
    newest = _newest_whole(candidates)
    if resume == "auto" and candidates and newest is None:
        raise Refused(
            f"{folder}: none of its {len(candidates)} checkpoints can be read; restore one, or start afresh with "
            f"another --out"
        )
    if resume == "auto" or (newest and newest.state.get("begun") == beginning(resume)):
        return newest
    if resume == "never":
        if candidates:
            raise Refused(f"{folder}: holds checkpoints, and --resume never would bury them; give another --out")
        return None
    saved = verify(Path(resume))
    newer = [candidate.name for candidate in candidates if candidate.name > f"step-{saved.step:08d}"]
    if newer:
        raise Refused(
            f"{folder}: holds {newer[-1]}, which is newer than {resume}; give another --out or remove what is newer"
        )
    return saved


def beginning(resume: str) -> str:
    """Returns what checkpoints note of how their run began: `auto`, `never`, or the whole path of a checkpoint."""
    return resume if resume in ("auto", "never") else str(Path(resume).resolve())


def _newest_whole(candidates: list[Path]) -> Saved | None:
    for candidate in reversed(candidates):
        try:
            return verify(candidate)
        except Refused as error:
            logger.warning("passed over %s", error)
    return None


def verify(folder: Path) -> Saved:
    """Compares a checkpoint with its manifest; raises `Refused` that says what is wrong."""
    try:
        manifest = dict(json.loads((folder / MANIFEST).read_text()))
    except FileNotFoundError:
        raise Refused(f"{folder}: has no {MANIFEST}, so it is no complete checkpoint") from None
    except (ValueError, TypeError, OSError) as error:
        raise Refused(f"{folder / MANIFEST}: cannot be read: {error}") from None
    if manifest.get("format") != FORMAT_VERSION:
        raise Refused(
            f"{folder / MANIFEST}: has format {manifest.get('format')}, this Tubelet reads {FORMAT_VERSION}; use the "
            f"Tubelet that wrote it"
        )
    if manifest.pop("sha256", None) != _sha256_of(manifest):
        raise Refused(f"{folder / MANIFEST}: was changed since it was written")
    for name, entry in manifest["files"].items():
        _compare(folder / name, entry["bytes"], entry["sha256"])
    return Saved(folder, manifest["step"], manifest["state"])


def _compare(path: Path, size_bytes: int, sha256: str) -> None:
    try:
        if not path.is_file():
            raise Refused(f"{path}: is missing")
        if path.stat().st_size != size_bytes:
            raise Refused(f"{path}: has {path.stat().st_size} bytes, its manifest says {size_bytes}")
        if sha256_of_file(path) != sha256:
            raise Refused(f"{path}: its content differs from what its manifest says")
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror}") from None


def _sha256_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
