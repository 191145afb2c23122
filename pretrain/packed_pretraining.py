"""What pretraining does otherwise where clips are packed: the objective, the held-out loss, and the pictures.

The siblings of the functions in `pretraining.py`, which chooses between them.
"""

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config import PretrainConfig
from pretrain.data.packed_clips import PackedBatch
from pretrain.data.packed_views import PackedEvaluationViews, PackedViews
from pretrain.data.shards import ShardSet
from pretrain.engine.distributed import Processes
from pretrain.engine.trainer import Objective
from pretrain.held_out import held_out_loss
from pretrain.packing import decoded_tokens, joined, packing_of, visible_tokens


def packed_reconstruction_loss(processes: Processes, accumulation: int) -> Objective:
    """Returns the objective of packed clips: the losses of a batch's decoded tokens over their number in the step.

    That number is summed over all processes and micro-batches, so every decoded token of a step weighs the same,
    wherever it is computed. The trainer averages over processes and micro-batches, which the objective makes good.

    Args:
        processes: All processes of the run.
        accumulation: Micro-batches in a step.
    """
    parts = processes.world * accumulation

    def objective(model: nn.Module, batch: PackedBatch) -> Tensor:
        count = processes.sum(batch.decoded_in_step)
        losses = model(visible_tokens(batch), decoded_tokens(batch)).loss
        return losses.sum() * parts / count.clamp(min=1)

    return objective


def packed_reconstruction_loss_on(
    held_out: ShardSet, config: PretrainConfig, processes: Processes, model: nn.Module
) -> dict[str, float]:
    """Computes the mean loss over the masked tokens of held-out samples, each alone; every rank calls it.

    Arguments and result are those of `pretraining.reconstruction_loss_on`.
    """
    data = config.data
    packing = packing_of(data, config.encoder.tubelet, config.mask)
    views = PackedEvaluationViews(held_out, packing, decoder=data.decoder, decode_limit_s=data.decode_limit_s)

    def losses_of(batch: list[PackedViews]) -> tuple[Tensor, Tensor]:
        sequences = joined([one.sequences for one in batch], processes.device)
        losses = model(visible_tokens(sequences), decoded_tokens(sequences)).loss
        return losses.double().sum(1), (sequences.decoded_segments >= 0).sum(1)

    return held_out_loss(views, held_out.samples, config, processes, losses_of)


def packed_reconstruction(
    config: PretrainConfig, shards: ShardSet, model: nn.Module, number: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Reconstructs all masked tokens of one sample; see `pretraining.reconstruction`."""
    data = config.data
    packing = packing_of(data, config.encoder.tubelet, config.mask.as_shown())
    views = PackedEvaluationViews(shards, packing, decoder=data.decoder, decode_limit_s=data.decode_limit_s)
    view = views[number, True]
    sequences = joined([view.sequences], device)
    prediction = model(visible_tokens(sequences), decoded_tokens(sequences)).prediction[0].float().cpu().numpy()
    if view.error is not None:
        return None
    visible, masked = views.tokens(number)
    _, (clip,) = views.clips(number)
    return clip.numpy(), visible, masked, prediction[: len(masked)]
