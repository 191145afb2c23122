"""A run folder and the life of a run in it: owned, resumed, recorded, and ended with its outcome on disk."""

import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.engine.checkpoint import Checkpoints, Saved, engine_kind, find_checkpoint, is_out_of_space
from pretrain.engine.distributed import Processes
from pretrain.engine.ownership import RunLock
from pretrain.engine.tracking import Tracker, TrackingMode, cut_back
from pretrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, DiskFull, Refused, TubeletError
from pretrain.files import write_json, write_text

logger = logging.getLogger(__name__)

SKIPPED = "skipped.jsonl"
LIBRARIES = ("tubelet", "torch", "accelerate", "deepspeed", "timm")


@dataclasses.dataclass
class Run:
    """An open run.

    Attributes:
        out: Its folder.
        processes: All its processes.
        checkpoints: Writes and loads checkpoints.
        tracker: Writes metrics.
        state: What checkpoints note beside the weights.
        saved: The checkpoint to go on from, or None.
    """

    out: Path
    processes: Processes
    checkpoints: Checkpoints
    tracker: Tracker
    state: dict[str, Any]
    saved: Saved | None

    @property
    def first_step(self) -> int:
        """Steps done already."""
        return self.saved.step if self.saved else 0

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the final figures, the last of the run's files."""
        if self.processes.is_main:
            write_json(self.out / "summary.json", summary)


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
    keep_last: int,
) -> Iterator[Run]:
    """Opens a run folder for this job and leaves its outcome there, however the run ends.

    Args:
        out: The run's folder.
        processes: All processes of the run.
        stage: `pretrain` or `finetune`.
        config: The resolved configuration, for the tracker.
        config_yaml: The same as YAML, for `config.yaml`.
        resume: `auto`, `never`, or a checkpoint's folder.
        tracking: Whether W&B is used.
        identity: What must not change between attempts (data, order, seed), under the names of its fields.
        keep_last: Checkpoints that stay.

    Raises:
        Refused: Another job owns the run, its checkpoints cannot be read, or `identity` has changed.
    """
    folder = Path(out)
    lock = processes.on_main_only(lambda: _claim(folder))
    started = time.time()
    tracker = None
    try:
        saved = processes.on_main(lambda: find_checkpoint(folder / "checkpoints", resume))
        if saved:
            refuse_changes(saved, identity)
            logger.info("going on from step %d (%s)", saved.step, saved.folder)
        if processes.is_main:
            write_text(folder / "config.yaml", config_yaml)
            (folder / "outcome.json").unlink(missing_ok=True)
        checkpoints = Checkpoints(folder / "checkpoints", processes, lock, keep_last)
        run_id = saved.state.get("run_id") if saved else None
        tracker = Tracker(folder, tracking, config, stage, processes.is_main, run_id)
        tracker.cut_back(saved.step if saved else 0)
        if processes.is_main:
            cut_back(folder / SKIPPED, saved.step if saved else 0)
        state = {
            "stage": stage,
            "identity": identity,
            "engine": engine_kind(processes),
            "run_id": tracker.run_id,
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        }
        yield Run(folder, processes, checkpoints, tracker, state, saved)
    except BaseException as raised:
        error = _as_expected(raised, folder)
        _end(folder, tracker, lock, _exit_code(error), f"{type(error).__name__}: {error}", started)
        if error is raised:
            raise
        raise error from raised
    _end(folder, tracker, lock, EXIT_DONE, "done", started)


def refuse_changes(saved: Saved, identity: dict[str, Any]) -> None:
    """Raises `Refused` if a checkpoint was written with another identity: its order of samples would not go on."""
    before = saved.state["identity"]
    for name, value in identity.items():
        if before.get(name) != value:
            raise Refused(
                f"{name}: is {value}, but {saved.folder} was written with {before.get(name)}; use that again or give "
                f"another --out"
            )


def _claim(folder: Path) -> RunLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return RunLock(folder)
    except OSError as error:
        raise Refused(f"{folder}: cannot be written ({error.strerror}); give another --out") from None


def _exit_code(error: BaseException) -> int:
    if isinstance(error, TubeletError):
        return error.exit_code
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FAILED


def _as_expected(error: BaseException, folder: Path) -> BaseException:
    """Returns what to tell of an error: a full disk may show in any library that writes to the run's folder."""
    if isinstance(error, TubeletError) or not is_out_of_space(error):
        return error
    return DiskFull(f"{folder}: no space left on the disk; free some and start again; its checkpoints are whole")


def _end(folder: Path, tracker: Tracker | None, lock: RunLock | None, code: int, reason: str, started: float) -> None:
    """Closes the run's record, unless another job owns it by now; ranks other than 0 have no lock, nothing to close."""
    if lock is None:
        return
    if tracker is not None:
        tracker.finish(code)
    with contextlib.suppress(OSError):  # a full disk must not hide why the run ended
        if not lock.is_held():
            return
        outcome = {"exit_code": code, "reason": reason, "attempt": lock.owner.attempt}
        write_json(folder / "outcome.json", outcome | {"seconds": round(time.time() - started, 1), "pid": os.getpid()})
        lock.release()
