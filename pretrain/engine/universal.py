"""ZeRO's checkpoints for another number of processes, through DeepSpeed's universal format.

ZeRO 1, 2 and 3 cut weights and optimiser states into one part for each process, and DeepSpeed reads them back with as
many processes only. Its universal format (Lian et al. 2024, arXiv:2406.18820) holds one file for each parameter and
state instead, which any number of processes can read:

    universal-00001200.tmp-3/    converted by rank 0 while the others wait; manifest.json is written last
    universal-00001200/          beside step-00001200, which it names by the hash of its manifest, and pruned with it

DeepSpeed's files are pickles. They are only read once their hashes were found to be those of the manifest.
"""

import argparse
import contextlib
import io
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from pretrain.engine.manifest import MANIFEST, Saved, describe_files, verify, write_manifest
from pretrain.errors import Refused, TubeletError
from pretrain.files import sync_file

logger = logging.getLogger(__name__)

TAG = "deepspeed"
"""Folder inside a checkpoint in which DeepSpeed writes."""
CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
"""What a checkpoint must hold for the converter to take it."""


def universal_folder(checkpoints: Path, step: int) -> Path:
    """Returns where the converted checkpoint of a step belongs."""
    return checkpoints / f"universal-{step:08d}"


def find_converted(folder: Path, saved: Saved) -> bool:
    """Whether `folder` holds a whole conversion of this very checkpoint."""
    if not folder.exists():
        return False
    try:
        return verify(folder).state == _origin(saved)
    except Refused as error:
        logger.warning("%s; converting %s again", error, saved.folder)
        return False


def convert(saved: Saved, temporary: Path) -> None:
    """Converts a ZeRO checkpoint into a folder that is complete, with its manifest, but not yet committed.

    Args:
        saved: The checkpoint; its files have been compared with its manifest.
        temporary: A folder that does not exist.

    Raises:
        OSError: It cannot be written.
        TubeletError: DeepSpeed cannot convert it.
    """
    from deepspeed.checkpoint import ds_to_universal

    temporary.mkdir()
    arguments = argparse.Namespace(
        input_folder=str(saved.folder / TAG),
        output_folder=str(temporary / TAG),
        num_extract_workers=1,  # more would be forked, out of a process that has threads
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # for checkpoints without CLIENT_STATE
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ds_to_universal.main(arguments)
    except OSError:
        raise
    except Exception as error:
        raise TubeletError(
            f"{saved.folder}: DeepSpeed cannot convert it for another number of processes ({error}); start with "
            f"{saved.state['engine']['world']} processes"
        ) from error
    (temporary / "latest_universal").unlink()
    folders = [path for path in temporary.rglob("*") if path.is_dir()]
    files = describe_files(temporary, (path for path in temporary.rglob("*") if path.is_file()))
    for folder in folders:
        sync_file(folder)
    write_manifest(temporary, saved.step, _origin(saved), files)


def load_universal(engine: Any, folder: Path) -> None:
    """Loads a converted checkpoint; every rank calls it.

    ZeRO 3 gives all groups what the checkpoint says of the first: one decay, which the caller sets anew for each, and
    one and the same tensor that counts Adam's steps, which would then count as many steps at once as there are groups.
    """
    config = engine._config
    config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(folder, tag=TAG)
    finally:
        config.load_universal_checkpoint = False
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def remove_orphans(checkpoints: Path) -> None:
    """Removes conversions of checkpoints that are no longer there."""
    for folder in checkpoints.glob("universal-*"):
        if ".tmp-" not in folder.name and not (checkpoints / folder.name.replace("universal-", "step-")).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _origin(saved: Saved) -> dict[str, Any]:
    return {"converted_from": saved.folder.name, MANIFEST: saved.sha256}
