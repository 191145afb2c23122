"""A classifier as one file that runs without Tubelet, checked against the model.

    NAME.pt2     a program of torch.export      `export_program.py`
    NAME.onnx    a graph of ONNX                `export_onnx.py`

Either file holds the weights, the normalisation of colours and the names of the classes; cutting clips out of videos is
left to the caller, and the text `tubelet.json` inside it tells how, and what makes probabilities of logits. A file is
kept only if its logits are the model's.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune import export_onnx, export_program
from finetune.classifier import Classifier, ModelDescription, load
from pretrain.errors import Refused, TubeletError
from pretrain.files import replacing

logger = logging.getLogger(__name__)


class Format(NamedTuple):
    """A kind of file."""

    write: Callable[[Classifier, Tensor, dict[str, str], Path], None]
    """Writes a model in evaluation mode, traced with clips, more than one, and texts under their names, to a file."""
    read: Callable[[Path], Callable[[Tensor], Tensor]]
    """Returns the function from clips to logits that a file holds."""


FORMATS = {
    ".pt2": Format(export_program.write, export_program.read),
    ".onnx": Format(export_onnx.write, export_onnx.read),
}
"""Each by the suffix of its files."""
DESCRIPTION = "tubelet.json"
TOLERANCE = 1e-4
"""Greatest difference of logits that another order of summation explains."""
TRACED_BATCH, CHECKED_BATCHES = 2, (1, 3)


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """An export."""

    model: str
    """Model folder or finetuning run."""
    out: str
    """File to write: NAME.pt2 for torch.export, NAME.onnx for ONNX."""

    def validate(self) -> None:
        """Raises `Refused` for a file that cannot be written, or is there already."""
        out = Path(self.out)
        if out.suffix not in FORMATS:
            names = " or ".join(f"NAME{suffix}" for suffix in FORMATS)
            raise Refused(f"out: {out} has no suffix of an exported model; give {names}")
        if out.exists():
            raise Refused(f"out: {out} is there already; name another, or remove it")
        if not os.access(out.parent, os.W_OK):
            raise Refused(f"out: {out} cannot be written; name a file in a folder that is there and takes files")


def export(config: ExportConfig) -> float:
    """Writes a classifier in the format that the file's suffix names.

    Returns:
        The greatest difference of its logits from the model's, on random clips.

    Raises:
        Refused: The folder holds no classifier, one of packed clips, or the file cannot be written in this format.
        TubeletError: The file computes something else than the model; nothing is written.
    """
    config.validate()
    model, description = load(config.model)
    if description.packing:
        raise Refused(
            f"model: {config.model} was trained on packed clips, whose sequences are put together outside the model; "
            f"finetune without data.packing to export"
        )
    out = Path(config.out)
    write, read = FORMATS[out.suffix]
    metadata = {DESCRIPTION: json.dumps(told_of(description))}
    with replacing(out) as temporary:
        write(model, random_clips(description, TRACED_BATCH), metadata, temporary)
        difference = difference_of(read(temporary), model, description)
        if not difference <= TOLERANCE:
            raise TubeletError(
                f"{config.out}: its logits are {difference:.1e} from those of {config.model}, more than "
                f"{TOLERANCE:.0e}; nothing was written"
            )
    logger.info(f"wrote {config.out}; greatest difference from {config.model} in logits: {difference:.1e}")
    return difference


def told_of(description: ModelDescription) -> dict[str, Any]:
    """Returns what a user of the file has to know: the clips that it takes and the classes that it knows."""
    clip = description.clip
    frames = {
        "frames": clip.frames,
        "sampling": clip.sampling,
        "frame_rate": clip.frame_rate,
        "stride": clip.stride,
    }
    return (
        {"clips": f"(B, {clip.frames}, {clip.size}, {clip.size}, 3) uint8, RGB"}
        | frames
        | {
            "size": clip.size,
            "short_side": description.short_side,
            "classes": list(description.classes),
            "probabilities": "sigmoid" if description.multi_label else "softmax",
        }
    )


@torch.no_grad()
def difference_of(exported: Callable[[Tensor], Tensor], model: Classifier, description: ModelDescription) -> float:
    """Returns the greatest difference of what was exported from a model, in logits of batches of two sizes."""
    differences = []
    for batch in CHECKED_BATCHES:
        clips = random_clips(description, batch)
        differences.append((exported(clips) - model(clips)).abs().max().item())
    return max(differences)


def random_clips(description: ModelDescription, batch: int) -> Tensor:
    """Returns clips `(B, T, H, W, 3)` uint8, the same at every call."""
    clip = description.clip
    shape = (batch, clip.frames, clip.size, clip.size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(batch))
