"""The loss of a batch of labelled clips: cross-entropy, of mixed clips where a recipe mixes, or of several labels."""

import functools

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from finetune.config import MixingConfig
from pretrain.data.clips import ClipConfig
from pretrain.data.loader import Batch
from pretrain.data.packed_clips import PackedBatch
from pretrain.engine.trainer import Objective
from pretrain.packing import visible_tokens


def build_objective(
    mixing: MixingConfig, clip: ClipConfig, classes: int, packed: bool = False, multi_label: bool = False
) -> Objective:
    """Returns the loss of a batch: cross-entropy with label smoothing, over mixed clips if the recipe mixes.

    Of a multi-label set it is the binary cross-entropy of each class, whose labels are smoothed towards a half.

    Logits are taken in full precision, whatever the model computes in. A packed batch holds as many clips as another,
    so its mean needs no count of others.
    """
    if packed:
        return functools.partial(
            packed_classification_loss, nn.CrossEntropyLoss(label_smoothing=mixing.label_smoothing)
        )
    if multi_label and not mixing.mixes:
        return lambda model, batch: binary_entropy(model(batch.clips), smoothed(batch.labels, mixing.label_smoothing))
    if not mixing.mixes:
        entropy = nn.CrossEntropyLoss(label_smoothing=mixing.label_smoothing)
        return lambda model, batch: entropy(model(batch.clips).float(), batch.labels)
    mixup = Mixup(
        mixup_alpha=mixing.mixup,
        cutmix_alpha=mixing.cutmix,
        prob=mixing.probability,
        switch_prob=mixing.switch_probability,
        label_smoothing=mixing.label_smoothing,
        num_classes=classes,
        multi_label=multi_label,
    )
    entropy_of = binary_entropy if multi_label else SoftTargetCrossEntropy()

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        clips, targets = mix(mixup, batch, clip)
        return entropy_of(model(clips).float(), targets)

    return objective


def binary_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean binary cross-entropy over classes, from 0 to 1 in `(B, K)` targets."""
    return nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)


def smoothed(labels: Tensor, smoothing: float) -> Tensor:
    """Returns `(B, K)` labels of 1 and 0 that are drawn to a half by a share, as timm's Mixup draws them."""
    return labels * (1 - smoothing) + smoothing / 2


def packed_classification_loss(entropy: nn.Module, model: nn.Module, batch: PackedBatch) -> Tensor:
    """Returns the mean loss of the clips of packed sequences."""
    logits = model(visible_tokens(batch), clips=batch.labels.shape[1])
    return entropy(logits.flatten(0, 1).float(), batch.labels.flatten())


def mix(mixup: Mixup, batch: Batch, clip: ClipConfig) -> tuple[Tensor, Tensor]:
    """Mixes clips with timm's Mixup, which knows images: all frames of a clip are its channels.

    Returns:
        Normalised float clips `(B, T, H, W, C)` and soft targets `(B, classes)`.
    """
    mean, std = (colour_constants(part, batch.clips.device) for part in (clip.mean, clip.std))
    normalised = (batch.clips.float() / 255 - mean) / std
    B, T, H, W, C = normalised.shape
    images = normalised.permute(0, 1, 4, 2, 3).reshape(B, T * C, H, W)
    mixed, targets = mixup(images, batch.labels)
    return mixed.view(B, T, C, H, W).permute(0, 1, 3, 4, 2).contiguous(), targets


@functools.cache
def colour_constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Returns a constant for each colour channel on the device; it is copied there once, since a copy waits for it."""
    return torch.tensor(values, device=device)
