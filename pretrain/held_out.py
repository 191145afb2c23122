"""The mean loss over held-out samples, shared among all processes; what the loss of a batch is, its caller tells."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pretrain.config import PretrainConfig
from pretrain.data.order import evaluation_slice
from pretrain.data.views import evaluation_batches
from pretrain.engine.distributed import Processes


def held_out_loss(
    views: Dataset,
    samples: int,
    config: PretrainConfig,
    processes: Processes,
    losses_of: Callable[[list[Any]], tuple[Tensor, Tensor]],
) -> dict[str, float]:
    """Sums losses over the held-out samples that a run uses; every rank calls it.

    Args:
        views: The held-out samples.
        samples: How many the set holds.
        config: The run's configuration, which says how many of them are used.
        processes: All processes, which share the samples.
        losses_of: Returns for a list of views the sum of each sample's losses, and how many losses it sums; `(B,)`.

    Returns:
        `validation_errors`, the samples that cannot be decoded, and `validation_loss` over the others if there are any.
    """
    data = config.data
    chosen = config.validation.chosen(samples)
    numbers, counted = evaluation_slice(len(chosen), processes.world, processes.rank)
    total = torch.zeros(3, dtype=torch.float64)
    for batch in evaluation_batches(views, chosen[numbers], counted, data.micro_batch, data.workers):
        sums, counts = (part.double().cpu() for part in losses_of(batch))
        decoded = torch.tensor([one.counted and one.error is None for one in batch])
        errors = sum(one.counted and one.error is not None for one in batch)
        total += torch.tensor([sums[decoded].sum(), counts[decoded].sum(), errors], dtype=torch.float64)
    loss_sum, count, errors = processes.gather(total).sum(0).tolist()
    return {"validation_errors": int(errors)} | ({"validation_loss": loss_sum / count} if count else {})
