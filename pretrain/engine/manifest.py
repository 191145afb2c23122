"""The manifest of a checkpoint: what is in its folder, with sizes and hashes, and what the run noted beside it.

It is written last, so a folder without one is no complete checkpoint, and it holds a hash of itself.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.errors import Refused
from pretrain.files import sha256_of_file, sync_file, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class OtherFormat(Refused):
    """A checkpoint is whole, but of another Tubelet: to pass over it for an older one would lose its steps."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint whose manifest verified.

    Attributes:
        folder: Where it is.
        step: Steps done when it was written.
        state: What the run noted beside the weights.
        sha256: Hash of the manifest, which stands for the whole content.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    sha256: str = ""


def describe_files(folder: Path, paths: Iterable[Path]) -> dict[str, Any]:
    """Syncs files to the disk and returns size and hash of each, by its path inside `folder`."""
    described = {}
    for path in paths:
        sync_file(path)
        described[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    return described


def write_manifest(folder: Path, step: int, state: dict[str, Any], files: dict[str, Any]) -> None:
    """Writes the manifest of a folder, the last of its files, and syncs it.

    Args:
        folder: The checkpoint's folder.
        step: Steps done.
        state: What the run notes beside the weights.
        files: What `describe_files` returned for all files of the folder.
    """
    manifest = {"format": FORMAT_VERSION, "step": step, "state": state, "files": dict(sorted(files.items()))}
    write_json(folder / MANIFEST, manifest | {"sha256": _sha256_of(manifest)})


def verify(folder: Path) -> Saved:
    """Compares a checkpoint with its manifest.

    Raises:
        OtherFormat: It is whole, but this Tubelet cannot read it.
        Refused: It is damaged or incomplete; says where.
    """
    try:
        manifest = dict(json.loads((folder / MANIFEST).read_text()))
    except FileNotFoundError:
        raise Refused(f"{folder}: has no {MANIFEST}, so it is no complete checkpoint") from None
    except (ValueError, TypeError, OSError) as error:
        raise Refused(f"{folder / MANIFEST}: cannot be read: {error}") from None
    sha256 = manifest.pop("sha256", None)
    is_unchanged = sha256 == _sha256_of(manifest)
    if manifest.get("format") != FORMAT_VERSION:
        refusal = OtherFormat if is_unchanged else Refused
        raise refusal(
            f"{folder / MANIFEST}: has format {manifest.get('format')}, this Tubelet reads {FORMAT_VERSION}; use the "
            f"Tubelet that wrote it, or give another --out"
        )
    if not is_unchanged:
        raise Refused(f"{folder / MANIFEST}: was changed since it was written")
    for name, entry in manifest["files"].items():
        _compare(folder / name, entry["bytes"], entry["sha256"])
    return Saved(folder, manifest["step"], manifest["state"], sha256)


def size_bytes(folder: Path) -> int:
    """Returns how much room the files of a folder take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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
