"""Finetuning by low-rank adapters (LoRA, Hu et al., 2021, arXiv 2106.09685), which the peft library puts into place.

All that was pretrained stays as it is. Beside a linear layer W of a block two narrow matrices are trained, and the
layer returns W x + alpha / rank * B A x; B starts at zero, so training starts from the pretrained model. The head and
what else is fresh are trained as ever.

What leaves a run has W + alpha / rank * B A in the place of W, under its name: nobody who reads it knows of adapters.
"""

import logging
from types import ModuleType

import torch
from torch import Tensor, nn

from finetune.classifier import Classifier
from finetune.config import LoraConfig
from finetune.freezing import Frozen, stays, trained_share
from pretrain.errors import Refused
from pretrain.model.blocks import Stack
from pretrain.model.encoder import Encoder

logger = logging.getLogger(__name__)

NAME = "default"
"""What peft calls an adapter that nobody has named."""


def add_adapters(classifier: Classifier, config: LoraConfig, frozen: Frozen | None = None) -> None:
    """Adds adapters to a classifier's pretrained encoder, and logs what is left to train.

    Args:
        classifier: The classifier, with the pretrained weights.
        config: The adapters; a rank of None adds none.
        frozen: The lowest layers, which have no adapters; None gives adapters to all blocks.

    Raises:
        Refused: peft is missing, no block is left, or the rank is that of the weights or more.
    """
    if config.rank is None:
        return
    peft, encoder = _import_peft(), classifier.encoder
    if config.rank >= encoder.width:
        raise Refused(
            f"lora.rank: {config.rank} is not below the encoder's width of {encoder.width}, so the adapters would be "
            f"larger than its weights; use less, or leave lora out to train those"
        )
    targets = [name for name in adapted_layers(encoder, config) if not (frozen and stays(encoder, name, frozen))]
    if not targets:
        raise Refused(
            f"freeze: {frozen} layers leave no block for the adapters of lora.rank; use at most {encoder.layers}"
        )
    described = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
    )
    peft.inject_adapter_in_model(described, encoder, NAME)  # which freezes all else
    if encoder.class_token is not None:
        encoder.class_token.requires_grad_(not encoder.has_class_tokens)
    logger.info(
        f"the encoder stays as pretrained, with adapters of rank {config.rank} beside {len(targets)} of its linear "
        f"layers: {trained_share(classifier)}"
    )


def adapted_layers(encoder: Encoder, config: LoraConfig) -> list[str]:
    """Returns the names of the linear layers of an encoder's blocks that have adapters."""
    stacks = [name for name, module in encoder.named_modules() if isinstance(module, Stack)]
    return [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(tuple(f"{stack}." for stack in stacks))
        and config.targets in ("all", "mlp" if ".mlp." in name else "attention")
    ]


def merged(weights: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Returns the weights that a classifier without adapters needs to compute what one with adapters does.

    Sums are in full precision and on the CPU, so that they are the same for whoever asks.

    Args:
        weights: The weights of a classifier with adapters by its own names, whole.
        config: The adapters; without any the weights are returned as they are.
    """
    if config.rank is None:
        return weights
    plain = {}
    for name, value in weights.items():
        layer, wrapped, part = name.partition(".base_layer.")
        if wrapped and part == "weight":
            down, up = (_full(weights[f"{layer}.lora_{matrix}.{NAME}.weight"]) for matrix in "AB")
            value = _full(value) + config.scale * (up @ down)
        if ".lora_" not in name:
            plain[f"{layer}.{part}" if wrapped else name] = value
    return plain


def merge_adapters(classifier: nn.Module, config: LoraConfig) -> None:
    """Puts the merged weights in the place of a trained classifier's adapters, with which its training ends."""
    if config.rank is None:
        return
    weights = merged(classifier.state_dict(), config)
    for name, module in list(classifier.named_modules()):
        if name.endswith(".base_layer"):
            classifier.set_submodule(name.removesuffix(".base_layer"), module)
    classifier.load_state_dict(weights)


def _full(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32)


def _import_peft() -> ModuleType:
    try:
        import peft  # takes seconds
    except ImportError as error:
        raise Refused(f"lora.rank: peft cannot be imported ({error}); pip install 'tubelet[lora]'") from None
    return peft
