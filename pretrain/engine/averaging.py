"""A moving average of the weights, which is what validation, evaluation and the exported model see.

The average is timm's ModelEmaV3, kept in fp32 beside the weights on every rank, and changed after every optimiser step.
It follows from the weights and the step alone, so all ranks have the same one: rank 0 writes it into checkpoints, and
any number of processes goes on from it. Where DeepSpeed trains copies in half precision, these are what is averaged.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.engine.distributed import Processes
from pretrain.errors import Refused

AVERAGE = "average.safetensors"
"""Its file in a checkpoint."""


@dataclasses.dataclass(frozen=True)
class AverageConfig:
    """Moving average of the weights (timm's ModelEmaV3)."""

    decay: float | None = None
    """Share of the average that each step keeps, such as 0.9999; None averages nothing."""
    warmup: bool = False
    """Keep less in the first steps, 1 - step ** (-2 / 3) of it, until that exceeds the decay; for short runs."""

    def validate(self) -> None:
        """Raises `Refused` for a decay that cannot be."""
        if self.decay is not None and not 0 < self.decay < 1:
            raise Refused(f"ema.decay: {self.decay} must be greater than 0 and less than 1; leave it out for none")
        if self.warmup and self.decay is None:
            raise Refused("ema.warmup: needs ema.decay, such as 0.9999")


class WeightAverage:
    """The average of a model's weights.

    Args:
        model: The model with its first weights, not prepared yet.
        config: Its decay.
        processes: All processes of the run.
    """

    def __init__(self, model: nn.Module, config: AverageConfig, processes: Processes) -> None:
        """Begins with a copy of the weights, on the device."""
        from timm.utils import ModelEmaV3  # takes seconds

        assert config.decay is not None, "else there is nothing to average"
        self.processes = processes
        self._ema = ModelEmaV3(model, decay=config.decay, use_warmup=config.warmup, dtype=torch.float32)
        self._ema.to(processes.device)

    @property
    def model(self) -> nn.Module:
        """A model with the average as its weights; never trained."""
        return self._ema.module

    def weights(self) -> dict[str, Tensor]:
        """Returns the average under the model's own names."""
        return self.model.state_dict()

    @property
    def size_bytes(self) -> int:
        """What it takes in a checkpoint."""
        return sum(value.nbytes for value in self.weights().values())

    def decay_at(self, step: int) -> float:
        """Returns the share of the average that step `step` kept, the first being 1."""
        return self._ema.get_decay(step)

    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights of the prepared model after step `step`, the first being 1; that one is copied."""
        self._ema.update(self.processes.accelerator.unwrap_model(model), step)

    def load(self, folder: Path) -> None:
        """Puts a checkpoint's average in place; raises `Refused` if it holds none, or that of another model."""
        try:
            self.model.load_state_dict(load_file(folder / AVERAGE))
        except FileNotFoundError:
            raise Refused(
                f"ema.decay: {folder} was written without an average; leave ema.decay out, or give another --out"
            ) from None
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise Refused(f"{folder / AVERAGE}: is of another model: {reason}; give another --out") from None

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Overwrites the weights of the prepared model with the average."""
        own = self.processes.accelerator.unwrap_model(model).state_dict()
        for name, value in self.weights().items():
            own[name].copy_(value)

    @contextlib.contextmanager
    def shown_by(self, model: nn.Module) -> Iterator[None]:
        """Lets the prepared model, with its precision and compilation, have the average as its weights for a while."""
        own = self.processes.accelerator.unwrap_model(model).state_dict()
        kept = {name: value.clone() for name, value in own.items()}
        self.put_into(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    own[name].copy_(value)
