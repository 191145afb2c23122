"""The vision part of X-CLIP (arXiv 2208.02816) in Hugging Face's layout: `XCLIPVisionModel`, alone or in `XCLIPModel`.

The class tokens carry their position; the last norm, which X-CLIP puts on class tokens only, stands on all tokens. What
belongs to text, to prompts and to the integration of frames over the vision model is left out.
"""

from pretrain.model.encoder import EncoderConfig
from pretrain.model.weights.parts import (
    AttentionNames,
    ConvertedModel,
    activation_of,
    biases_of,
    colours,
    embedding,
    heads_of,
    modules,
    separate_attention,
    sizes,
    tubelet_of,
)
from pretrain.model.weights.source import Source, Weights

BESIDES = (
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "prompts_visual_layernorm.",
    "prompts_visual_projection",
    "mit.",
    "prompts_generator.",
    "logit_scale",
)
BLOCK = {
    "message": "message_fc",
    "message_norm": "message_ln",
    "attention_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
ATTENTION = AttentionNames("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
MESSAGE_ATTENTION = AttentionNames(*(name.replace("self_attn", "message_attn") for name in ATTENTION))


def from_xclip(source: Source) -> ConvertedModel:
    """Converts `XCLIPVisionModel`, or the part of an `XCLIPModel` that sees."""
    whole = "vision_model.embeddings.class_embedding" in source
    base = source.under("vision_model." if whole else "")
    base.config = source.config.get("vision_config") or source.config
    if whole:
        source.leave_out(*BESIDES)
    base.leave_out("embeddings.position_ids")
    weights: Weights = embedding(base, "embeddings.patch_embedding")
    weights |= modules(base, {"input_norm": "pre_layernorm", "norm": "post_layernorm"})
    depth = base.count("encoder.layers")
    for number in range(depth):
        block = xclip_block(base.under(f"encoder.layers.{number}."))
        weights |= {f"blocks.{number}.{name}": weight for name, weight in block.items()}
    positions = base.take("embeddings.position_embedding.weight")
    weights["class_token"] = (base.take("embeddings.class_embedding") + positions[0]).view(1, 1, -1)
    weights["positions.places"] = positions[1:].unsqueeze(0)
    width = positions.shape[-1]
    return ConvertedModel(
        "Hugging Face X-CLIP",
        EncoderConfig(
            name="cross_frame",
            **sizes(width, depth, heads_of(base, width, depth), len(weights["blocks.0.mlp.fc1.bias"])),
            tubelet=tubelet_of(base.take("embeddings.patch_embedding.weight")),
            positions="spatial",
            activation=activation_of(base.setting("hidden_act", str, "quick_gelu"), source),
            biases=biases_of(base, key_bias=f"encoder.layers.0.{ATTENTION.key}.bias"),
            norm_eps=base.setting("layer_norm_eps", float, 1e-5),
            input_norm=True,
        ),
        base.setting("num_frames", int),
        base.image_size(),
        *colours(source),
        weights,
        left_out=tuple(source.left_out),
    )


def xclip_block(source: Source) -> Weights:
    """Converts one layer of X-CLIP's vision encoder."""
    return (
        modules(source, BLOCK)
        | separate_attention(source, ATTENTION)
        | separate_attention(source, MESSAGE_ATTENTION, "message_attention.")
    )


def clip_block(source: Source) -> Weights:
    """Converts one layer of CLIP's encoders, which have no messages."""
    own = {ours: theirs for ours, theirs in BLOCK.items() if not ours.startswith("message")}
    return modules(source, own) | separate_attention(source, ATTENTION)
