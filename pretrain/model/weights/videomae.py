"""VideoMAE (arXiv 2203.12602) in Hugging Face's layout and in the authors' own (MCG-NJU/VideoMAE).

Biases of Hugging Face's attention are `query.bias` and `value.bias` in new releases of transformers and `q_bias` and
`v_bias` in old ones and in all published files; both are read. The authors' layout is that of `modeling_pretrain.py`
(`encoder.*`, `decoder.*`) and `modeling_finetune.py`.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch

from pretrain.errors import Refused
from pretrain.model.encoder import EncoderConfig
from pretrain.model.mae import DecoderConfig
from pretrain.model.weights.parts import (
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
    shared: dict[str, Any] = {
        "activation": activation_of(source.setting("hidden_act", str, "gelu"), source),
        "norm_eps": source.setting("layer_norm_eps", float, 1e-12),
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
        source.setting("num_frames", int),
        source.image_size(),
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
    return _with_entrance(source, weights, depth, hidden, source.setting("decoder_num_attention_heads", int), targets)


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
    return _with_entrance(source, weights, depth, hidden, DECODER_HEADS.get(width, max(width // 64, 1)), "normalised")
