"""Image models: timm's ViT (arXiv 2010.11929) and MAE (arXiv 2111.06377), whose keys are timm's.

The layout is that of timm's `vision_transformer.py`; MAE's `models_mae.py` (facebookresearch/mae) adds a decoder, which
is left out, and its `models_vit.py` the norm behind the mean. An image model becomes a joint encoder of clips of one
frame; `inflation.py` makes longer clips of it.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from pretrain.errors import Refused
from pretrain.model.blocks import LAYER_NORM_EPS, ActivationName
from pretrain.model.encoder import EncoderConfig
from pretrain.model.weights.parts import (
    IMAGE_LAYOUT,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PARTS,
    ConvertedModel,
    Head,
    biases_of,
    colours,
    embedding,
    fused_attention,
    heads_of,
    modules,
    pair,
    sizes,
)
from pretrain.model.weights.source import Source, Weights

DECODER = ("mask_token", "decoder_embed.", "decoder_pos_embed", "decoder_blocks.", "decoder_norm.", "decoder_pred.")
BLOCK = {"attention_norm": "norm1", "mlp_norm": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
ATTENTION_NORMS = {"attention.query_norm": "attn.q_norm", "attention.key_norm": "attn.k_norm"}


class Untold(NamedTuple):
    """What a state dict of an image model does not tell; the values are those of most models."""

    heads: int | None = None
    norm_eps: float = LAYER_NORM_EPS
    activation: ActivationName = "gelu"


def from_image(source: Source) -> ConvertedModel:
    """Converts a `timm.models.VisionTransformer`, or the encoder of facebookresearch/mae."""
    source.leave_out(*DECODER)
    weights: Weights = embedding(source, "patch_embed.proj")
    width, _, *patch = source.take("patch_embed.proj.weight").shape
    depth = source.count("blocks")
    for number in range(depth):
        block = image_block(source.under(f"blocks.{number}."))
        weights |= {f"blocks.{number}.{name}": weight for name, weight in block.items()}
    size = _take_positions(source, weights, (patch[0], patch[1]))
    if "norm_pre.weight" in source:
        weights |= modules(source, {"input_norm": "norm_pre"})
    head = _take_last_norm(source, weights)
    untold = _untold(source)
    source.heads = source.heads or untold.heads
    published = source.config.get("pretrained_cfg", source.config)
    return ConvertedModel(
        IMAGE_LAYOUT,
        EncoderConfig(
            **sizes(width, depth, heads_of(source, width, depth), len(weights["blocks.0.mlp.fc1.bias"])),
            tubelet=(1, patch[0], patch[1]),
            positions="learned",
            activation=untold.activation,
            biases=biases_of(source, key_bias="blocks.0.attn.qkv.bias"),
            qk_norm="blocks.0.attn.q_norm.weight" in source,
            layer_scale=1e-5 if "blocks.0.ls1.gamma" in source else None,
            norm_eps=untold.norm_eps,
            input_norm="norm_pre.weight" in source,
        ),
        1,
        size,
        *colours(source, published.get("mean", IMAGENET_MEAN), published.get("std", IMAGENET_STD)),
        weights,
        head=head,
        left_out=tuple(source.left_out),
    )


def image_block(source: Source) -> Weights:
    """Converts one block of timm's ViT."""
    weights = modules(source, BLOCK) | fused_attention(source, "attn")
    if "attn.q_norm.weight" in source:
        weights |= modules(source, ATTENTION_NORMS)
    for ours, theirs in {"attention_scale": "ls1", "mlp_scale": "ls2"}.items():
        if f"{theirs}.gamma" in source:
            weights[f"{ours}.gamma"] = source.take(f"{theirs}.gamma")
    return weights


def _take_positions(source: Source, weights: Weights, patch: tuple[int, int]) -> tuple[int, int]:
    """Puts positions and class token among the weights; returns height and width of the images in pixels.

    The position of the class token is added to it, where it has one.
    """
    table = source.take("pos_embed")
    places = table.shape[1]
    rows, columns = _image_grid(source, patch, places - ("cls_token" in source), places)
    before = places - rows * columns
    if "cls_token" in source:
        weights["class_token"] = source.take("cls_token") + (table[:, :1] if before else 0)
    weights["positions.table"] = table[:, before:]
    return rows * patch[0], columns * patch[1]


def _image_grid(source: Source, patch: tuple[int, int], *places: int) -> tuple[int, int]:
    """Returns the rows and columns of patches whose product is one of `places`: those configured, or a square."""
    published = source.config.get("pretrained_cfg", source.config).get("input_size")
    if published:
        height, width = pair(published[-2:])
        if height // patch[0] * (width // patch[1]) in places:
            return height // patch[0], width // patch[1]
    for count in places:
        if count > 0 and math.isqrt(count) ** 2 == count:
            return math.isqrt(count), math.isqrt(count)
    raise Refused(
        f"{source.name}: pos_embed has {places[-1]} positions, which form no square; give its config.json too"
    )


def _take_last_norm(source: Source, weights: Weights) -> Head | None:
    """Puts the last norm among the weights; returns the head, where ours can be what it is."""
    last = "norm" if "norm.weight" in source else "fc_norm"
    weights |= modules(source, {"norm": last})
    pools_mean = last == "fc_norm"
    if "head.weight" not in source or pools_mean == ("cls_token" in source):
        source.leave_out("head.")
        return None
    head = modules(source, {"last": "head"})
    if pools_mean:
        head |= {f"norm.{part}": weights[f"norm.{part}"] for part in PARTS}
    return Head("mean" if pools_mean else "class_token", head, None)


def _untold(source: Source) -> Untold:
    """Returns what timm knows of the architecture that the source's configuration names."""
    if "architecture" not in source.config:
        return Untold()
    import timm

    arguments: dict[str, Any] = source.config.get("model_args", {})
    if not timm.is_model(str(source.config["architecture"])):
        raise Refused(
            f"{source.name}: timm has no {source.config['architecture']}, which config.json names; give its own"
        )
    try:
        with torch.device("meta"):
            model = timm.create_model(source.config["architecture"], **arguments)
        block = model.get_submodule("blocks.0")
        heads = cast(Any, block.get_submodule("attn")).num_heads
        eps = cast(Any, block.get_submodule("norm1")).eps
    except (RuntimeError, AttributeError, TypeError) as error:
        raise Refused(f"{source.name}: timm cannot build {source.config['architecture']} ({error})") from None
    activation = block.get_submodule("mlp.act")
    if isinstance(activation, nn.GELU):
        return Untold(heads, eps, "gelu_tanh" if activation.approximate == "tanh" else "gelu")
    if type(activation).__name__ in ("QuickGELU", "QuickGELUActivation"):
        return Untold(heads, eps, "quick_gelu")
    raise Refused(f"{source.name}: its activation {type(activation).__name__} is none of Tubelet's")
