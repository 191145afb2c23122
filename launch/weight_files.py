"""Files of weights that others wrote: safetensors, and PyTorch's as far as they can be read without running code."""

import argparse
import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pretrain.errors import Refused
from pretrain.model.weights.source import Source

NAMES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("model", "module", "state_dict")
"""Keys under which training programs put a model's weights among other things."""


def read_source(path: Path, heads: int | None) -> Source:
    """Reads weights with the `config.json` and the `preprocessor_config.json` beside them.

    Args:
        path: A file, or a folder that holds one.
        heads: Number of heads, for sources that do not tell.

    Raises:
        Refused: There is no such file, it cannot be read, or reading it would run code.
    """
    file = weights_file(path)
    config, processor = (read_json(file.parent / name) for name in ("config.json", "preprocessor_config.json"))
    return Source(read_weights(file), config, processor, heads, name=str(file))


def weights_file(path: Path) -> Path:
    """Returns the file of weights at `path`, which is that file or its folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise Refused(f"{path}: there is no such file or folder; download the model first")
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise Refused(f"{path}: which file holds the weights? (found: {found}); name the file itself")
    return files[0]


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or nothing where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise Refused(f"{path}: is no JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise Refused(f"{path}: is no JSON object; download it again")
    return content


def read_weights(file: Path) -> dict[str, Tensor]:
    """Reads a state dict; of a training program's checkpoint, the model's. Numbers become fp32.

    Raises:
        Refused: The file is damaged, holds no weights, or holds objects that only running code could make.
    """
    if file.suffix == ".safetensors":
        try:
            return in_full_precision(load_file(file))
        except (SafetensorError, OSError) as error:
            raise Refused(f"{file}: cannot be read ({error}); download it again") from None
    if not starts_as_pytorch(file):
        raise Refused(f"{file}: is no file of PyTorch's, but perhaps a page or a pointer to it; download it again")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors of VideoMAE and MAE put one there
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise Refused(
            f"{file}: holds more than weights, and reading it could run code; where you trust it, load it with torch "
            f"and write its state dict by safetensors.torch.save_file"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, struct.error) as error:
        raise Refused(f"{file}: cannot be read ({' '.join(str(error).split())[:120]}); download it again") from None
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise Refused(f"{file}: holds no state dict (weights by name); give a file of weights")
    return in_full_precision(content)


def starts_as_pytorch(file: Path) -> bool:
    """Tells whether a file begins as torch.save's do: as a zip archive, or in old releases as a pickle."""
    with open(file, "rb") as opened:
        return opened.read(2) in (b"PK", b"\x80\x02")


def in_full_precision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights in fp32, in which conversion adds and interpolates; whole numbers stay."""
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
