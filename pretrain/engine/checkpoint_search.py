"""Which checkpoint a run goes on from.

It is the newest folder whose manifest verifies, and a line says why others were passed over. A folder that holds
checkpoints of which none can be read is an error, never a fresh start.
"""

import logging
from pathlib import Path

from pretrain.engine.manifest import OtherFormat, Saved, verify
from pretrain.errors import Refused

logger = logging.getLogger(__name__)


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
        Refused: None of the checkpoints can be read, the named one cannot, the newest one is of another format, or the
            start would bury existing ones.
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
        except OtherFormat:
            raise
        except Refused as error:
            logger.warning("passed over %s", error)
    return None
