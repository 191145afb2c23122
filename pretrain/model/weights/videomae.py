"""VideoMAE (arXiv 2203.12602) in Hugging Face's layout, in and out, and in the authors' own (MCG-NJU/VideoMAE).

Biases of Hugging Face's attention are `query.bias` and `value.bias` in new releases of transformers and `q_bias` and
`v_bias` in old ones and in all published files; both are read, the second is written, which every release reads. The
authors' layout is that of `modeling_pretrain.py` (`encoder.*`, `decoder.*`) and `modeling_finetune.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.errors import Refused
from pretrain.model.encoder import EncoderConfig
from pretrain.model.mae import DecoderConfig
from pretrain.model.weights.parts import (
    ACTIVATIONS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PARTS,
    AttentionNames,
    ConvertedModel,
    Decoder,
    Head,
    activation_of,
    class_names,
    colours,
    embedding,
    fused_attention,
    heads_of,
    modules,
    pair,
    separate_attention,
    sizes,
    tubelet_of,
)
from pretrain.model.weights.source import Source, Weights

PUBLISHED_FRAMES, PUBLISHED_SIZE = 16, 224
"""Clips of all of the authors' models; their files do not tell."""

DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
"""Heads of the authors' decoders by width; their files do not tell."""

BLOCK = {
    "attention_norm": "layernorm_before",
    "mlp_norm": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
OF_ANY_VALUE = (
    *("variant", "width", "depth", "heads", "mlp_ratio", "tubelet"),
    *("activation", "norm_eps", "drop_path", "temporal_depth"),
)
"""Fields of an encoder that Hugging Face's VideoMAE has too, or that joint attention does not read; others are fixed."""

AUTHORS_BLOCK = {"attention_norm": "norm1", "mlp_norm": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
ATTENTION = AttentionNames(
    "attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense"
)
DECODER = {"decoder_norm": "decoder.norm", "decoder_head": "decoder.head"}


def from_videomae(source: Source) -> ConvertedModel:
    """Converts Hugging Face's `VideoMAEModel`, `VideoMAEForPreTraining` or `VideoMAEForVideoClassification`."""
    base = source.under("videomae." if "videomae.embeddings.patch_embeddings.projection.weight" in source else "")
    weights = embedding(base, "embeddings.patch_embeddings.projection")
    depth = base.count("encoder.layer")
    kernel = base.take("embeddings.patch_embeddings.projection.weight")
    weights |= _stack(base, "encoder.layer", depth, "blocks", _block)
    hidden = len(weights["blocks.0.mlp.fc1.bias"])
    shared = {
        "activation": activation_of(source.config.get("hidden_act", "gelu"), source),
        "norm_eps": source.config.get("layer_norm_eps", 1e-12),
    }
    config = EncoderConfig(
        **sizes(len(kernel), depth, heads_of(source, len(kernel), depth), hidden), tubelet=tubelet_of(kernel), **shared
    )
    head = _head(source) if "classifier.weight" in source else None
    if "layernorm.weight" in base:
        weights |= modules(base, {"norm": "layernorm"})
    elif head is not None:
        weights |= {f"norm.{part}": head.weights[f"norm.{part}"] for part in PARTS}
    return ConvertedModel(
        "Hugging Face VideoMAE",
        config,
        source.setting("num_frames"),
        pair(source.setting("image_size")),
        *colours(source),
        weights,
        head=head,
        decoder=_decoder(source) if "encoder_to_decoder.weight" in source else None,
    )


def _head(source: Source) -> Head:
    if "fc_norm.weight" not in source:
        raise Refused(
            f"{source.name}: config.json has use_mean_pooling false, whose head reads the first token of the clip; "
            f"Tubelet has no such head, take a model with mean pooling"
        )
    weights = modules(source, {"norm": "fc_norm", "last": "classifier"})
    return Head("mean", weights, class_names(source, len(weights["last.bias"])))


def _decoder(source: Source) -> Decoder:
    depth = source.count("decoder.decoder_layers")
    weights = _stack(source, "decoder.decoder_layers", depth, "decoder_blocks", _block) | modules(source, DECODER)
    hidden = len(weights["decoder_blocks.0.mlp.fc1.bias"])
    targets: Literal["normalised", "pixels"] = "normalised" if source.config.get("norm_pix_loss", True) else "pixels"
    return _with_entrance(source, weights, depth, hidden, source.setting("decoder_num_attention_heads"), targets)


def _with_entrance(
    source: Source, weights: Weights, depth: int, hidden: int, heads: int, targets: Literal["normalised", "pixels"]
) -> Decoder:
    """Returns the decoder with the mask token and the way from the encoder to it, whose bias the authors leave out."""
    entrance = source.take("encoder_to_decoder.weight")
    width = len(entrance)
    weights |= {
        "decoder_embedding.weight": entrance,
        "decoder_embedding.bias": entrance.new_zeros(width),
        "mask_token": source.take("mask_token"),
    }
    return Decoder(
        DecoderConfig(width=width, depth=depth, heads=heads, mlp_ratio=hidden / width, targets=targets), weights
    )


def _stack(source: Source, theirs: str, depth: int, ours: str, block: Callable[[Source], Weights]) -> Weights:
    return {
        f"{ours}.{number}.{name}": weight
        for number in range(depth)
        for name, weight in block(source.under(f"{theirs}.{number}.")).items()
    }


def _block(source: Source) -> Weights:
    weights = modules(source, BLOCK)
    if "attention.attention.q_bias" not in source:
        return weights | separate_attention(source, ATTENTION)
    names = ATTENTION
    projections = torch.cat([source.take(f"{name}.weight") for name in names[:3]])
    return (
        weights
        | {"attention.qkv.weight": projections}
        | {f"attention.{our}_bias": source.take(f"attention.attention.{our[0]}_bias") for our in ("query", "value")}
        | modules(source, {"attention.projection": names.projection})
    )


def from_authors(source: Source) -> ConvertedModel:
    """Converts the layout of MCG-NJU/VideoMAE, pretrained (with its decoder) or finetuned."""
    pretrained = "encoder.patch_embed.proj.weight" in source
    base = source.under("encoder." if pretrained else "")
    weights = embedding(base, "patch_embed.proj")
    kernel = base.take("patch_embed.proj.weight")
    depth = base.count("blocks")
    weights |= _stack(base, "blocks", depth, "blocks", _authors_block)
    hidden = len(weights["blocks.0.mlp.fc1.bias"])
    config = EncoderConfig(
        **sizes(len(kernel), depth, heads_of(source, len(kernel), depth), hidden),
        tubelet=tubelet_of(kernel),
        layer_scale=1e-5 if "blocks.0.gamma_1" in base else None,
    )
    head = None
    if pretrained or "norm.weight" in base:
        weights |= modules(base, {"norm": "norm"})
    elif "head.weight" in source:
        head = Head("mean", modules(source, {"norm": "fc_norm", "last": "head"}), None)
        weights |= {f"norm.{part}": head.weights[f"norm.{part}"] for part in PARTS}
    return ConvertedModel(
        "MCG-NJU VideoMAE",
        config,
        PUBLISHED_FRAMES,
        (PUBLISHED_SIZE, PUBLISHED_SIZE),
        *colours(source),
        weights,
        head=head,
        decoder=_authors_decoder(source) if pretrained and "encoder_to_decoder.weight" in source else None,
    )


def _authors_block(source: Source) -> Weights:
    weights = modules(source, AUTHORS_BLOCK) | fused_attention(source, "attn")
    if "gamma_1" in source:
        weights |= {"attention_scale.gamma": source.take("gamma_1"), "mlp_scale.gamma": source.take("gamma_2")}
    return weights


def _authors_decoder(source: Source) -> Decoder:
    depth = source.count("decoder.blocks")
    weights = _stack(source, "decoder.blocks", depth, "decoder_blocks", _authors_block) | modules(source, DECODER)
    width = len(weights["decoder_norm.bias"])
    hidden = len(weights["decoder_blocks.0.mlp.fc1.bias"])
    return _with_entrance(source, weights, depth, hidden, DECODER_HEADS.get(width, width // 64), "normalised")


def to_videomae(model: ConvertedModel) -> tuple[Weights, dict[str, Any]]:
    """Returns weights and configuration as transformers' VideoMAE classes load them.

    Args:
        model: A model; a head makes it a `VideoMAEForVideoClassification`, a decoder a `VideoMAEForPreTraining`, and
            else it is a `VideoMAEModel`.

    Raises:
        Refused: VideoMAE has no place for something that the model has.
    """
    refuse_unless_videomae(model)
    prefix = "" if model.head is None and model.decoder is None else "videomae."
    encoder = model.weights
    weights = _module_out(f"{prefix}embeddings.patch_embeddings.projection", encoder, "embedding.projection")
    kernel = weights[f"{prefix}embeddings.patch_embeddings.projection.weight"]
    weights[f"{prefix}embeddings.patch_embeddings.projection.weight"] = kernel.unflatten(
        1, (*model.encoder.tubelet, 3)
    ).permute(0, 4, 1, 2, 3)
    _, depth, _, _ = model.encoder.sizes()
    weights |= _stack_out(encoder, "blocks", depth, f"{prefix}encoder.layer")
    if model.head is None:
        weights |= _module_out(f"{prefix}layernorm", encoder, "norm")
    else:
        weights |= _module_out("fc_norm", model.head.weights, "norm") | _module_out(
            "classifier", model.head.weights, "last"
        )
    if model.decoder is not None and model.head is None:
        weights |= _decoder_out(model.decoder)
    return weights, videomae_config(model)


def _module_out(theirs: str, weights: Mapping[str, Tensor], ours: str) -> Weights:
    return {f"{theirs}.{part}": weights[f"{ours}.{part}"] for part in PARTS}


def _stack_out(weights: Mapping[str, Tensor], ours: str, depth: int, theirs: str) -> Weights:
    result: Weights = {}
    for number in range(depth):
        our, their = f"{ours}.{number}", f"{theirs}.{number}"
        for name, other in BLOCK.items():
            result |= _module_out(f"{their}.{other}", weights, f"{our}.{name}")
        projections = weights[f"{our}.attention.qkv.weight"].chunk(3)
        for name, projection in zip(ATTENTION[:3], projections, strict=True):
            result[f"{their}.{name}.weight"] = projection
        for name in ("query", "value"):
            result[f"{their}.attention.attention.{name[0]}_bias"] = weights[f"{our}.attention.{name}_bias"]
        result |= _module_out(f"{their}.{ATTENTION.projection}", weights, f"{our}.attention.projection")
    return result


def _decoder_out(decoder: Decoder) -> Weights:
    weights = decoder.weights
    if weights["decoder_embedding.bias"].any():
        raise Refused(
            "decoder_embedding.bias: Hugging Face's VideoMAE has no such bias, and here it is not zero; "
            "convert the encoder alone"
        )
    result = {"encoder_to_decoder.weight": weights["decoder_embedding.weight"], "mask_token": weights["mask_token"]}
    for ours, theirs in DECODER.items():
        result |= _module_out(theirs, weights, ours)
    return result | _stack_out(weights, "decoder_blocks", decoder.config.depth, "decoder.decoder_layers")


def refuse_unless_videomae(model: ConvertedModel) -> None:
    """Raises `Refused`, naming the field, where Hugging Face's VideoMAE cannot be what the model is."""
    for field in dataclasses.fields(EncoderConfig):
        value = getattr(model.encoder, field.name)
        if field.name not in OF_ANY_VALUE and value != field.default:
            raise Refused(
                f"encoder.{field.name}: is {value}, but Hugging Face's VideoMAE has {field.default}; "
                f"convert to safetensors instead"
            )
    _, h, w = model.encoder.tubelet
    if h != w:
        raise Refused(f"encoder.tubelet: is {h} x {w} in space, but Hugging Face's VideoMAE has square patches")
    if "class_token" in model.weights:
        raise Refused("class_token: Hugging Face's VideoMAE has none; convert to safetensors instead")
    if model.head is not None and (model.head.pool != "mean" or "norm.weight" not in model.head.weights):
        raise Refused(f"head.pool: is {model.head.pool}, but Hugging Face's VideoMAE has mean and one linear layer")


def videomae_config(model: ConvertedModel) -> dict[str, Any]:
    """Returns the `config.json` of a model in Hugging Face's VideoMAE layout."""
    width, depth, heads, mlp_ratio = model.encoder.sizes()
    kind = "VideoMAEModel"
    config: dict[str, Any] = {
        "model_type": "videomae",
        "image_size": model.size[0] if model.size[0] == model.size[1] else list(model.size),
        "patch_size": model.encoder.tubelet[1],
        "num_channels": 3,
        "num_frames": model.frames,
        "tubelet_size": model.encoder.tubelet[0],
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": round(width * mlp_ratio),
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == model.encoder.activation),
        "layer_norm_eps": model.encoder.norm_eps,
        "qkv_bias": True,
        "use_mean_pooling": model.head is not None,
    }
    if model.head is not None:
        kind = "VideoMAEForVideoClassification"
        classes = model.head.classes or tuple(f"LABEL_{n}" for n in range(len(model.head.weights["last.bias"])))
        config["id2label"] = {str(number): name for number, name in enumerate(classes)}
        config["label2id"] = {name: number for number, name in enumerate(classes)}
    elif model.decoder is not None:
        kind = "VideoMAEForPreTraining"
        decoder = model.decoder.config
        config |= {
            "decoder_hidden_size": decoder.width,
            "decoder_num_hidden_layers": decoder.depth,
            "decoder_num_attention_heads": decoder.heads,
            "decoder_intermediate_size": round(decoder.width * decoder.mlp_ratio),
            "norm_pix_loss": decoder.targets == "normalised",
        }
    return {"architectures": [kind], **config}


def videomae_processor(model: ConvertedModel) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` that goes with `videomae_config`."""
    height, width = model.size
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": min(model.size)},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.mean or IMAGENET_MEAN),
        "image_std": list(model.std or IMAGENET_STD),
    }
