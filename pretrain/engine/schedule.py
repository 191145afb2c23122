"""A cosine schedule with warm-up, timm's: what it sets at a step is a pure function of the step."""

from typing import Any

import torch
from timm.scheduler import CosineLRScheduler

from pretrain.engine.optimizer import OptimizerConfig


class StepSchedule(CosineLRScheduler):
    """timm's cosine schedule, which sets the weight decay too: every group's, at every step, whatever was loaded."""

    def __init__(self, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        """Notes the decay that the configuration gave each group."""
        super().__init__(optimizer, **options)
        self.decays = [group["weight_decay"] for group in optimizer.param_groups]

    def step_update(self, num_updates: int, metric: Any = None) -> None:
        """Sets the learning rate and the decay of every group for step `num_updates`, which alone decides them."""
        super().step_update(num_updates, metric)
        for group, decay in zip(self.optimizer.param_groups, self.decays, strict=True):
            group["weight_decay"] = decay


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, global_batch: int, warmup_steps: int, total_steps: int
) -> StepSchedule:
    """Returns the schedule; `step_update(step)` sets every group and depends on nothing but the step."""
    return StepSchedule(
        optimizer,
        t_initial=max(total_steps - warmup_steps, 1),
        lr_min=config.least_learning_rate(global_batch),
        warmup_t=warmup_steps,
        warmup_lr_init=config.warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )
