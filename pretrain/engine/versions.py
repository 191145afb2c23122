"""The versions of what decides a run's figures: Python, the libraries, and Tubelet's own source."""

import functools
import hashlib
import importlib.metadata
import platform
from pathlib import Path

LIBRARIES = (
    *("tubelet", "torch", "torchvision", "timm", "accelerate", "deepspeed", "transformers"),
    *("numpy", "safetensors", "webdataset", "decord2", "av"),
)
"""Those that have to be the same on all nodes."""
OTHERS = ("torchcodec", "wandb")
HOUSE = ("pretrain", "finetune", "launch")


def installed_versions() -> dict[str, str]:
    """Returns the versions of Python and of those libraries that are installed, by their names."""
    versions = {name: version_of(name) for name in (*LIBRARIES, *OTHERS)}
    return {"Python": platform.python_version()} | {name: version for name, version in versions.items() if version}


def version_of(library: str) -> str | None:
    """Returns a library's version; None where it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def source_hash() -> str:
    """Returns a hash of Tubelet's own source: checkouts of one version can differ."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(path for room in HOUSE for path in (root / room).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
