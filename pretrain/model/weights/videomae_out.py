"""Our models in Hugging Face's VideoMAE layout: weights, `config.json` and `preprocessor_config.json`.

Biases of attention are written as `q_bias` and `v_bias`, as in all published files: every release of transformers reads
them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain.errors import Refused
from pretrain.model.encoder import EncoderConfig
from pretrain.model.weights.parts import ACTIVATIONS, PARTS, ConvertedModel, Decoder
from pretrain.model.weights.source import Weights
from pretrain.model.weights.videomae import ATTENTION, BLOCK, DECODER

OF_ANY_VALUE = (
    *("variant", "width", "depth", "heads", "mlp_ratio", "tubelet"),
    *("activation", "norm_eps", "drop_path", "temporal_depth"),
)
"""Fields that Hugging Face's VideoMAE has too, or that joint attention never reads; others are fixed."""


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
        "image_mean": list(model.mean),
        "image_std": list(model.std),
    }
