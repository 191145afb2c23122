"""A run folder and the life of a run in it: owned, resumed, recorded, and ended with its outcome on disk."""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pretrain.engine.checkpoint import CheckpointConfig, Checkpoints, engine_kind, refuse_other_engine
from pretrain.engine.checkpoint_search import beginning, find_checkpoint
from pretrain.engine.distributed import Processes
from pretrain.engine.environment import describe_attempt, describe_rank, note_attempt
from pretrain.engine.failures import means_full_disk
from pretrain.engine.manifest import Saved
from pretrain.engine.ownership import RunLock
from pretrain.engine.preemption import StoppingConfig, StopRequests
from pretrain.engine.profiling import PROFILE
from pretrain.engine.tracking import METRICS, Tracker, TrackingMode, cut_back
from pretrain.engine.versions import installed_versions
from pretrain.engine.watchdog import Watchdog
from pretrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, DiskFull, Preempted, Refused, TubeletError
from pretrain.files import is_out_of_space, write_json, write_text

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
SKIPPED = "skipped.jsonl"
KEYS = "keys.jsonl"
SUMMARY = "summary.json"
WRITTEN_TO = ("encoder", "model", "pictures", PROFILE, "wandb")
"""Folders in which an attempt that was killed may have left files half written."""


@dataclasses.dataclass
class Run:
    """An open run; its record is as the last attempt left it until `begin`.

    Attributes:
        out: Its folder.
        processes: All its processes.
        config_yaml: The resolved configuration.
        tracking: Whether W&B is used.
        checkpoints: Writes and loads checkpoints.
        saved: The checkpoint to go on from, or None.
        state: What checkpoints note beside the weights, the configuration among it.
        stop: Knows whether this rank was told to stop.
        watchdog: Ends the job when no steps are made any more.
        tracker: Writes metrics, once the run has begun.
    """

    out: Path
    processes: Processes
    config_yaml: str
    tracking: TrackingMode
    checkpoints: Checkpoints
    saved: Saved | None
    state: dict[str, Any]
    stop: StopRequests
    watchdog: Watchdog
    tracker: Tracker | None = None

    @property
    def first_step(self) -> int:
        """Steps done already."""
        return self.saved.step if self.saved else 0

    def begin(self) -> Tracker:
        """Opens the record of this attempt, after all that may refuse it; every rank calls it."""
        ranks = self.processes.gather_objects(describe_rank(self.processes.rank, self.processes.device))
        environment = self.processes.on_main_only(lambda: self._rewrite_record(ranks))
        config, stage, run_id = (self.state[name] for name in ("config", "stage", "run_id"))
        shown = config | {"environment": environment}
        self.tracker = Tracker(self.out, self.tracking, shown, stage, self.processes.is_main, run_id)
        self.state["run_id"] = self.tracker.run_id
        return self.tracker

    def _rewrite_record(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """Cuts the record back to the step that this attempt goes on from; notes what it runs on, and returns it."""
        (self.out / "outcome.json").unlink(missing_ok=True)
        for name in (METRICS, SKIPPED, KEYS):
            cut_back(self.out / name, self.first_step)
        write_text(self.out / "config.yaml", self.config_yaml)
        assert self.checkpoints.lock, "rank 0 owns the run"
        environment = describe_attempt(self.checkpoints.lock.owner.attempt, self.first_step, ranks)
        note_attempt(self.out, environment)
        return environment

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the final figures, the last of the run's files; every rank calls it."""
        self.processes.on_main_only(lambda: write_json(self.out / SUMMARY, summary))


@contextlib.contextmanager
def open_run(
    out: str,
    processes: Processes,
    stage: str,
    config: dict[str, Any],
    config_yaml: str,
    resume: str,
    tracking: TrackingMode,
    identity: dict[str, Any],
    stays: CheckpointConfig,
    told: dict[str, str] | None = None,
    overridden: Collection[str] = (),
    override: bool = False,
    stopping: StoppingConfig | None = None,
) -> Iterator[Run]:
    """Opens a run folder for this job and leaves its outcome there, however the run ends.

    While it is open, the signals that stop a run are noted for the trainer; see `preemption.py`.

    Args:
        out: The run's folder.
        processes: All processes of the run.
        stage: `pretrain` or `finetune`.
        config: The resolved configuration, for the tracker and the checkpoints.
        config_yaml: The same as YAML, for `config.yaml`.
        resume: `auto`, `never`, or a checkpoint's folder.
        tracking: Whether W&B is used.
        identity: What must not change between attempts (data, order, seed, model), under the names of its fields.
        stays: Which checkpoints stay.
        told: How to tell what a value of `identity` stands for, such as the place of data, under the same names.
        overridden: Names in `identity` whose change does no harm to who insists on it.
        override: Whether one insists.
        stopping: When the run ends before its end; by default on signals alone.

    Raises:
        Refused: Another job owns the run, its checkpoints cannot be read, or `identity` has changed.
    """
    folder = Path(out)

    def find_saved() -> Saved | None:
        saved = find_checkpoint(folder / CHECKPOINTS, resume)
        if saved:
            refuse_other_engine(saved, processes)
            refuse_changes(saved, stage, identity, told or {}, overridden, override)
            logger.info("going on from step %d (%s)", saved.step, saved.folder)
        return saved

    limits = stopping or StoppingConfig(hang_limit_s=0)
    started = time.time()
    run = None
    with StopRequests(limits.time_limit_s) as stop:
        lock = processes.on_main_only(lambda: _claim(folder))
        try:
            saved = processes.on_main(find_saved)
            state = _state_of(folder, processes, stage, config, resume, identity, told or {}, saved)
            checkpoints = Checkpoints(folder / CHECKPOINTS, processes, lock, stays)
            watchdog = Watchdog(
                limits.hang_limit_s,
                folder,
                processes.rank,
                lambda reason: _leave(lock, folder, EXIT_FAILED, f"Hang: {reason}", started),
            )
            run = Run(folder, processes, config_yaml, tracking, checkpoints, saved, state, stop, watchdog)
            yield run
        except BaseException as raised:
            error = _as_expected(raised, folder)
            _end(run, lock, folder, _exit_code(error), f"{type(error).__name__}: {error}", started)
            if isinstance(error, Preempted):
                _wait_for_all(processes)
            if error is raised:
                raise
            raise error from raised
        _end(run, lock, folder, EXIT_DONE, "done", started)


def _state_of(
    folder: Path,
    processes: Processes,
    stage: str,
    config: dict[str, Any],
    resume: str,
    identity: dict[str, Any],
    told: dict[str, str],
    saved: Saved | None,
) -> dict[str, Any]:
    """Returns what checkpoints note beside the weights; arguments as for `open_run`, and the checkpoint to go on."""
    state = {
        "stage": stage,
        "identity": identity,
        "told": told,
        "engine": engine_kind(processes),
        "begun": beginning(resume),
        "run_id": None,
        "config": config,
        "versions": installed_versions(),
    }
    if saved and saved.folder.resolve().parent == (folder / CHECKPOINTS).resolve():
        state["run_id"] = saved.state.get("run_id")
        if resume == "auto":
            state["begun"] = saved.state.get("begun", "auto")
    return state


def _wait_for_all(processes: Processes) -> None:
    """Waits for rank 0 to close the record: srun and launchers kill all ranks as soon as one ends with another code."""
    with contextlib.suppress(RuntimeError):  # rank 0 was killed; what this rank knows is right all the same
        processes.barrier()


def refuse_changes(
    saved: Saved,
    stage: str,
    identity: dict[str, Any],
    told: dict[str, str],
    overridden: Collection[str] = (),
    override: bool = False,
) -> None:
    """Raises `Refused` if a checkpoint was written by another stage or with another identity, naming all that differs.

    See `open_run` for the arguments.
    """
    if saved.state["stage"] != stage:
        raise Refused(f"{saved.folder}: was written by {saved.state['stage']}, not by {stage}; give another --out")
    before, told_before = saved.state["identity"], saved.state.get("told", {})
    changed = [name for name, value in identity.items() if name in before and before[name] != value]
    if not changed:
        return
    differences = [
        f"{name}: is {told.get(name, identity[name])}, but {saved.folder} was written with "
        f"{told_before.get(name, before[name])}"
        for name in changed
    ]
    fixed = [name for name in changed if name not in overridden]
    if override and not fixed:
        logger.warning("%s; it is changed from here on", "; ".join(differences))
        return
    again = "that" if len(changed) == 1 else "those"
    if not fixed:
        remedy = f"use {again} again, give another --out, or insist with --override_config true"
    else:
        remedy = f"use {again} again or give another --out"
        if override:
            remedy += f"; --override_config cannot change {', '.join(fixed)}"
    raise Refused(f"{'; '.join(differences)}; {remedy}")


def refuse_other_groups(saved: Saved, groups: list[list[str]]) -> None:
    """Raises `Refused` if the optimiser that wrote a checkpoint grouped the parameters in another way.

    Args:
        saved: The checkpoint.
        groups: The names of the parameters in each group of the optimiser of now.
    """
    before = saved.state.get("groups", groups)
    if before == groups:
        return
    place, place_before = (
        {name: number for number, group in enumerate(members) for name in group} for members in (groups, before)
    )
    if len(groups) != len(before):
        raise Refused(
            f"optimizer.layer_decay: makes {len(groups)} groups of parameters, but {saved.folder} was written with "
            f"{len(before)}; use the layer_decay that it was written with, or give another --out"
        )
    moved = sorted(name for name in place.keys() | place_before.keys() if place_before.get(name) != place.get(name))
    raise Refused(
        f"{saved.folder}: holds another model than the configuration describes ({', '.join(moved[:3]) or 'the order'} "
        f"of its parameters differs); start with the configuration and the Tubelet that wrote it or another --out"
    )


def _claim(folder: Path) -> RunLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder)
        for leftover in (path for part in (".", *WRITTEN_TO) for path in folder.glob(f"{part}/*.tmp-*")):
            leftover.unlink()
        return lock
    except OSError as error:
        if is_out_of_space(error):
            raise DiskFull(f"{folder}: no space left on the disk; free some and start again") from None
        raise Refused(f"{folder}: cannot be written ({error.strerror}); give another --out") from None


def _exit_code(error: BaseException) -> int:
    if isinstance(error, TubeletError):
        return error.exit_code
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FAILED


def _as_expected(error: BaseException, folder: Path) -> BaseException:
    """Returns what to tell of an error: a full disk may show in any library that writes to the run's folder."""
    if isinstance(error, TubeletError) or not means_full_disk(error):
        return error
    return DiskFull(f"{folder}: no space left on the disk; free some and start again; its checkpoints are whole")


def _end(run: Run | None, lock: RunLock | None, folder: Path, code: int, reason: str, started: float) -> None:
    """Closes the run's record, unless another job owns it by now; ranks other than 0 have no lock, nothing to close."""
    if lock is None:
        return
    if run is not None and run.tracker is not None:
        run.tracker.finish(code)
    _leave(lock, folder, code, reason, started)


def _leave(lock: RunLock | None, folder: Path, code: int, reason: str, started: float) -> None:
    """Writes the outcome and gives the run free, if this process owns it."""
    with contextlib.suppress(OSError):  # a full disk must not hide why the run ended
        if lock is None or not lock.is_held():
            return
        owner = lock.owner
        outcome = {"exit_code": code, "reason": reason, "attempt": owner.attempt}
        outcome |= {"job": owner.job, "restarts": owner.restarts}  # slurm/job.sh knows its own attempt by them
        write_json(folder / "outcome.json", outcome | {"seconds": round(time.time() - started, 1), "pid": os.getpid()})
        lock.release()
