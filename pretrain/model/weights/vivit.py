"""ViViT's model 1 (arXiv 2103.15691) in Hugging Face's layout: that of transformers 5, and that of published files."""

from pretrain.model.encoder import EncoderConfig
from pretrain.model.weights.parts import (
    AttentionNames,
    ConvertedModel,
    Head,
    activation_of,
    biases_of,
    class_names,
    colours,
    embedding,
    heads_of,
    modules,
    separate_attention,
    sizes,
    tubelet_of,
)
from pretrain.model.weights.source import Source, Weights

BLOCK = {"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after"}
MLP = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
ATTENTION = AttentionNames("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")

OLD_MLP = {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
OLD_ATTENTION = AttentionNames(
    "attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense"
)


def from_vivit(source: Source) -> ConvertedModel:
    """Converts `VivitModel` or `VivitForVideoClassification`."""
    base = source.under("vivit." if "vivit.embeddings.cls_token" in source else "")
    old = "encoder.layer.0.layernorm_before.weight" in base
    stack, attention = ("encoder.layer", OLD_ATTENTION) if old else ("layers", ATTENTION)
    weights: Weights = embedding(base, "embeddings.patch_embeddings.projection") | modules(base, {"norm": "layernorm"})
    depth = base.count(stack)
    for number in range(depth):
        block = base.under(f"{stack}.{number}.")
        converted = modules(block, BLOCK | (OLD_MLP if old else MLP)) | separate_attention(block, attention)
        weights |= {f"blocks.{number}.{name}": weight for name, weight in converted.items()}
    positions = base.take("embeddings.position_embeddings")
    weights["class_token"] = base.take("embeddings.cls_token") + positions[:, :1]
    weights["positions.table"] = positions[:, 1:]
    head = None
    if "classifier.weight" in source:
        last = modules(source, {"last": "classifier"})
        head = Head("class_token", last, class_names(source, len(last["last.bias"])))
    base.leave_out("pooler.")
    width = positions.shape[-1]
    hidden = len(weights["blocks.0.mlp.fc1.bias"])
    return ConvertedModel(
        "Hugging Face ViViT",
        EncoderConfig(
            **sizes(width, depth, heads_of(source, width, depth), hidden),
            tubelet=tubelet_of(base.take("embeddings.patch_embeddings.projection.weight")),
            positions="learned",
            activation=activation_of(source.setting("hidden_act", str, "gelu_fast"), source),
            biases=biases_of(base, key_bias=f"{stack}.0.{attention.key}.bias"),
            norm_eps=source.setting("layer_norm_eps", float, 1e-6),
        ),
        source.setting("num_frames", int),
        source.image_size(),
        *colours(source, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        weights,
        head=head,
        left_out=tuple(source.left_out),
    )
