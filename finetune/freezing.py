"""Frozen finetuning: the lowest layers of a pretrained encoder, or all of them, stay as they are.

Frozen layers have no gradients and no optimiser state, and they are in evaluation mode, so that no branch of theirs is
skipped. The backward pass ends above them, with one exception: a fresh class token is always trained, and where it goes
through frozen layers its gradient comes back through them. With mean or attention pooling nothing does.
"""

import logging
from typing import Literal

from torch import nn

from finetune.classifier import Classifier
from pretrain.errors import Refused
from pretrain.model.encoder import Encoder

logger = logging.getLogger(__name__)

Frozen = int | Literal["encoder"]
"""Layers that stay, counted as `Encoder.layer_of` does: 1 is what comes before the blocks, or all of the encoder."""


def freeze(classifier: Classifier, frozen: Frozen | None) -> None:
    """Freezes the lowest layers of a classifier's pretrained encoder, and logs what is left to train.

    Args:
        classifier: The classifier, with the pretrained weights.
        frozen: The layers; None freezes nothing.

    Raises:
        Refused: The encoder has fewer layers.
    """
    if frozen is None:
        return
    encoder = classifier.encoder
    if frozen != "encoder" and frozen > encoder.layers + 1:
        raise Refused(
            f"freeze: {frozen} layers, but the encoder has {encoder.layers + 1}, the embedding included; use at most "
            f"that, or encoder for all that was pretrained"
        )
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not stays(encoder, name, frozen))
    classifier.frozen = [module for module in encoder.modules() if _is_frozen(module)]
    what = "the encoder stays" if frozen == "encoder" else f"the lowest {frozen} of {encoder.layers + 1} layers stay"
    logger.info(f"{what} as pretrained: {trained_share(classifier)}")
    if encoder.class_token is not None and encoder.class_token.requires_grad and not encoder.has_class_tokens:
        logger.info(
            "the class token is fresh and trained through the frozen layers; head.pool attention or mean is faster"
        )


def trained_share(model: nn.Module) -> str:
    """Tells how many of a model's parameters are trained."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"{trained:,} of {total:,} parameters are trained"


def stays(encoder: Encoder, name: str, frozen: Frozen) -> bool:
    """Whether what has this name in an encoder stays as pretrained."""
    if name == "class_token" and not encoder.has_class_tokens:
        return False
    return frozen == "encoder" or encoder.layer_of(name) < frozen


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
