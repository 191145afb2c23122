"""A classifier as one file that runs without Tubelet: a program of torch.export, checked against the model.

    program = torch.export.load("model.pt2", extra_files=(told := {"tubelet.json": ""})).module()
    logits = program(clips)                       # clips (B, T, H, W, 3) uint8, any B
    classes = json.loads(told["tubelet.json"])["classes"]

The file holds the weights, the normalisation of colours and the names of the classes; cutting clips out of videos is
left to the caller, and `tubelet.json` tells how, and what makes probabilities of logits. It is kept only if its logits
are the model's.
"""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.classifier import Classifier, ModelDescription, load
from pretrain.errors import Refused, TubeletError
from pretrain.files import replacing

logger = logging.getLogger(__name__)

SUFFIX = ".pt2"
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
    """File to write, NAME.pt2."""

    def validate(self) -> None:
        """Raises `Refused` for a file that cannot be written, or is there already."""
        out = Path(self.out)
        if out.suffix != SUFFIX:
            raise Refused(f"out: {out} is no name of an exported program; give NAME{SUFFIX}")
        if out.exists():
            raise Refused(f"out: {out} is there already; name another, or remove it")
        if not os.access(out.parent, os.W_OK):
            raise Refused(f"out: {out} cannot be written; name a file in a folder that is there and takes files")


def export(config: ExportConfig) -> float:
    """Writes a classifier as a program of torch.export.

    Returns:
        The greatest difference of its logits from the model's, on random clips.

    Raises:
        Refused: The folder holds no classifier, one of packed clips, or the file cannot be written.
        TubeletError: The program computes something else than the model; nothing is written.
    """
    config.validate()
    model, description = load(config.model)
    if description.packing:
        raise Refused(
            f"model: {config.model} was trained on packed clips, whose sequences are put together outside the model; "
            f"finetune without data.packing to export"
        )
    program = torch.export.export(
        model, (random_clips(description, TRACED_BATCH),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    with replacing(Path(config.out)) as temporary:
        with open(temporary, "wb") as file:
            torch.export.save(program, file, extra_files={DESCRIPTION: json.dumps(told_of(description))})
        difference = difference_from(model, temporary, description)
        if not difference <= TOLERANCE:
            raise TubeletError(
                f"{config.out}: its logits are {difference:.1e} from those of {config.model}, more than "
                f"{TOLERANCE:.0e}; nothing was written"
            )
    logger.info(f"wrote {config.out}; greatest difference from {config.model} in logits: {difference:.1e}")
    return difference


def told_of(description: ModelDescription) -> dict[str, Any]:
    """Returns what a user of the program has to know: the clips that it takes and the classes that it knows."""
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
def difference_from(model: Classifier, file: Path, description: ModelDescription) -> float:
    """Returns the greatest difference of the logits of a program in a file from a model's, in batches of two sizes."""
    with open(file, "rb") as opened:
        program = torch.export.load(opened).module()
    differences = []
    for batch in CHECKED_BATCHES:
        clips = random_clips(description, batch)
        differences.append((program(clips) - model(clips)).abs().max().item())
    return max(differences)


def random_clips(description: ModelDescription, batch: int) -> Tensor:
    """Returns clips `(B, T, H, W, 3)` uint8, the same at every call."""
    clip = description.clip
    shape = (batch, clip.frames, clip.size, clip.size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(batch))
