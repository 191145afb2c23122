"""How many bytes a checkpoint takes, and how many checkpoints a run leaves: arithmetic, nothing is written.

A checkpoint is weights and AdamW's state in the form that the engine keeps them. What the files need besides (names,
shapes, DeepSpeed's scripts, the manifest) is some hundred bytes for each tensor and is left out.
"""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from pretrain.engine.checkpoint import CheckpointConfig
from pretrain.engine.distributed import Precision
from pretrain.engine.memory import FULL, HALF, MOMENTS, Zero, read_zero


class KeptCheckpoints(NamedTuple):
    """How many checkpoints there are on the disk.

    Attributes:
        written: Over the whole run, if nothing interrupts it.
        finally_kept: At its end.
        most: At any time, the one that is being written included.
    """

    written: int
    finally_kept: int
    most: int


def checkpoint_bytes(parameters: int, constants: int, precision: Precision, zero: Zero | None = None) -> int:
    """Returns the bytes of one checkpoint, of all processes together.

    Args:
        parameters: Trained numbers of the model.
        constants: Numbers that the model's state holds and that are not trained.
        precision: Arithmetic of the forward and backward pass.
        zero: DeepSpeed's configuration; None is plain data parallelism.
    """
    size = FULL if zero is None or precision == "fp32" else HALF
    weights, master = size * parameters, FULL * parameters
    if zero is not None and zero.stage == 3:
        weights = 0  # the master weights stand for them
    if zero is None or (zero.stage == 0 and size == FULL):
        master = 0  # the weights are that already
    return weights + master + size * constants + MOMENTS * parameters


def checkpoint_bytes_of(model: nn.Module, precision: Precision, deepspeed: Path | None) -> int:
    """Returns the bytes of one checkpoint of a model, which may be on the meta device.

    Args:
        model: The model, not yet prepared for training.
        precision: Arithmetic of the forward and backward pass.
        deepspeed: File of a DeepSpeed configuration, or None for plain data parallelism.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    constants = sum(value.numel() for value in model.state_dict().values()) - trained
    return checkpoint_bytes(trained, constants, precision, read_zero(deepspeed) if deepspeed else None)


def kept_checkpoints(steps: int, config: CheckpointConfig) -> KeptCheckpoints:
    """Returns how many checkpoints a run of so many steps writes and keeps.

    A new one is there whole before an older one is removed, so there is one more for a while.
    """
    whole, rest = divmod(steps, config.every)
    written = whole + (rest > 0)

    def kept(saves: int) -> int:
        recent = min(saves, config.keep_last)
        older = min((saves - recent) * config.every, steps)
        return recent + (older // config.keep_every if config.keep_every else 0)

    return KeptCheckpoints(written, kept(written), max(kept(written), kept(max(written - 1, 0)) + 1))
