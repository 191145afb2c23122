"""AdamW with timm's parameter groups, and what a configuration says of the learning rate; `schedule.py` has its course.

The published learning rates are for 256 samples in a step: the rate in use is `base_lr * global_batch / 256`, and so
is the least one (MAE and VideoMAE scale both).
"""

import dataclasses
import math

import torch
from torch import nn

from pretrain.errors import Refused

PUBLISHED_BATCH = 256


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    base_lr: float = 1.5e-4
    """Learning rate for 256 samples in a step; scaled by global_batch / 256."""
    base_min_lr: float = 1e-5
    """Learning rate at the end, for 256 samples in a step; scaled alike."""
    warmup_lr: float = 0.0
    """Learning rate at the first step, as it is."""
    warmup_epochs: float | None = None
    """Length of the linear warm-up in epochs; this or warmup_steps."""
    warmup_steps: int | None = None
    """Length of the linear warm-up in steps; this or warmup_epochs."""
    weight_decay: float = 0.05
    """Decay of matrices; biases, norms and single vectors have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    eps: float = 1e-8
    """Term that keeps AdamW's division finite."""
    layer_decay: float | None = None
    """Factor from each layer's learning rate to the one below it; None trains all layers alike."""
    clip_grad: float | None = None
    """Greatest norm of the gradient; None clips nothing."""

    def validate(self) -> None:
        """Raises `Refused` for values that cannot train."""
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise Refused("optimizer: give one of warmup_epochs and warmup_steps, not both")
        for name in ("base_lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise Refused(f"optimizer.{name} must be greater than 0")
        for name in ("base_min_lr", "warmup_lr", "weight_decay", "warmup_epochs", "warmup_steps"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise Refused(f"optimizer.{name} must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise Refused(f"optimizer.betas: {list(self.betas)} must lie in [0, 1)")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise Refused(f"optimizer.layer_decay: {self.layer_decay} must be greater than 0 and at most 1")
        if self.clip_grad is not None and not 0 < self.clip_grad < math.inf:
            raise Refused("optimizer.clip_grad must be greater than 0; leave it out to clip nothing")

    def learning_rate(self, global_batch: int) -> float:
        """Returns the greatest learning rate."""
        return self.base_lr * global_batch / PUBLISHED_BATCH

    def least_learning_rate(self, global_batch: int) -> float:
        """Returns the learning rate at the end."""
        return self.base_min_lr * global_batch / PUBLISHED_BATCH

    def warmup(self, steps_per_epoch: int) -> int:
        """Returns the length of the warm-up in steps."""
        if self.warmup_epochs is not None:
            return round(self.warmup_epochs * steps_per_epoch)
        return self.warmup_steps or 0


def build_optimizer(model: nn.Module, config: OptimizerConfig, global_batch: int) -> torch.optim.AdamW:
    """Returns AdamW over timm's groups: with and without decay, and by layer if `config.layer_decay` is set.

    One kernel updates all parameters of a group. With layer decay, `model` needs a `group_matcher(coarse)` that returns
    a function from parameter names to layers.
    """
    from timm.optim import (  # takes seconds; a configuration needs none
        param_groups_layer_decay,
        param_groups_weight_decay,
    )

    # timm knows vectors by one dimension; class and mask tokens have leading ones, but a matrix stays one.
    vectors = [name for name, one in model.named_parameters() if one.ndim != 2 and one.squeeze().ndim <= 1]
    if config.layer_decay is None:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=vectors)
    else:
        groups = param_groups_layer_decay(
            model, config.weight_decay, no_weight_decay_list=vectors, layer_decay=config.layer_decay
        )
    rate = config.learning_rate(global_batch)
    return torch.optim.AdamW(groups, lr=rate, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True)


def members_of_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Returns the names of the parameters in each group of an optimiser; neither model nor optimiser is prepared."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
