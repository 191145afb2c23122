"""A converted model beside its reference implementation, on one random clip."""

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.classifier import Classifier
from finetune.config import HeadConfig
from finetune.conversion import HEAD_MODULES
from pretrain.errors import Refused
from pretrain.model.blocks import LAYER_NORM_EPS
from pretrain.model.encoder import Encoder
from pretrain.model.encoders import build_encoder
from pretrain.model.mae import MaskedAutoencoder
from pretrain.model.masking import MaskConfig, draw_mask
from pretrain.model.weights.image import DECODER as IMAGE_DECODER
from pretrain.model.weights.parts import IMAGE_LAYOUT, PARTS, ConvertedModel
from pretrain.model.weights.source import Source

TOLERANCE = 1e-4
"""Greatest difference of outputs that rounding explains."""

MASK = MaskConfig("tube", 0.75)


class Comparison(NamedTuple):
    """How far a converted model is from its reference.

    Attributes:
        reference: The reference's class.
        output: What was compared.
        difference: Greatest absolute difference.
        greatest: Greatest absolute value of the reference's output.
    """

    reference: str
    output: str
    difference: float
    greatest: float


@torch.no_grad()
def compare(source: Source, model: ConvertedModel) -> Comparison | None:
    """Runs a random clip through the reference with the source's weights and through ours with the converted ones.

    Args:
        source: The weights as they came.
        model: The converted model, before it is inflated or resized.

    Returns:
        How far they are apart; None where no installed package has a model of the layout.

    Raises:
        Refused: The reference cannot be built, or does not take the weights.
    """
    comparisons = {
        "Hugging Face VideoMAE": ("transformers", _beside_videomae),
        "Hugging Face ViViT": ("transformers", _beside_vivit),
        "Hugging Face X-CLIP": ("transformers", _beside_xclip),
        IMAGE_LAYOUT: ("timm", _beside_timm),
    }
    package, beside = comparisons.get(model.layout, ("", None))
    if beside is None or importlib.util.find_spec(package) is None:
        return None
    shape = (1, model.frames, *model.size, 3)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        reference, output, theirs, ours = beside(source, model, clip)
    except (RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise Refused(
            f"{source.name}: {package} cannot put these weights into the model that config.json and they describe; "
            f"download both again"
        ) from error
    difference = (theirs - ours).abs().max().item()
    return Comparison(type(reference).__name__, output, difference, theirs.abs().max().item())


Beside = tuple[nn.Module, str, Tensor, Tensor]


def _beside_videomae(source: Source, model: ConvertedModel, clip: Tensor) -> Beside:
    pixels = _pixel_values(clip, model)
    if model.decoder is not None:
        reference = _transformers_model("VideoMAEForPreTraining", source)
        reference.decoder.norm.eps = LAYER_NORM_EPS  # the authors'; transformers leaves torch's
        visible, masked = (torch.from_numpy(part).unsqueeze(0) for part in draw_mask(MASK, model.grid, 0, 0))
        hidden = torch.zeros(1, model.grid.tokens, dtype=torch.bool).scatter_(1, masked, True)
        autoencoder = MaskedAutoencoder(_encoder(model), model.decoder.config).eval()
        autoencoder.load_state_dict(model.decoder.weights, strict=False)
        prediction = autoencoder.decode(autoencoder.encoder(clip, visible), visible, masked)
        return reference, "reconstructions", reference(pixels, bool_masked_pos=hidden).logits, prediction
    if model.head is not None:
        reference = _transformers_model("VideoMAEForVideoClassification", source)
        reference.fc_norm.eps = LAYER_NORM_EPS
        return reference, "logits", reference(pixels).logits, _classifier(model)(clip)
    reference = _transformers_model("VideoMAEModel", source)
    return reference, "tokens", reference(pixels).last_hidden_state, _encoder(model)(clip).tokens


def _beside_vivit(source: Source, model: ConvertedModel, clip: Tensor) -> Beside:
    pixels = _pixel_values(clip, model)
    if model.head is not None:
        reference = _transformers_model("VivitForVideoClassification", source)
        return reference, "logits", reference(pixels).logits, _classifier(model)(clip)
    reference = _transformers_model("VivitModel", source)
    encoded = _encoder(model)(clip)
    tokens = torch.cat([encoded.class_token.unsqueeze(1), encoded.tokens], 1)
    return reference, "tokens", reference(pixels).last_hidden_state, tokens


def _beside_xclip(source: Source, model: ConvertedModel, clip: Tensor) -> Beside:
    part = "vision_model."
    weights = {name.removeprefix(part): value for name, value in source.weights.items() if name.startswith(part)}
    config = source.config.get("vision_config") or source.config
    reference = _transformers_model("XCLIPVisionModel", Source(weights or source.weights, config))
    output = reference(_pixel_values(clip, model)[0])
    theirs = reference.post_layernorm(output.last_hidden_state)  # (T, 1 + n, D)
    encoded = _encoder(model)(clip)
    theirs = torch.cat([theirs[:, :1].mean(0, keepdim=True), theirs[:, 1:].flatten(0, 1).unsqueeze(0)], 1)
    return reference, "tokens", theirs, torch.cat([encoded.class_token.unsqueeze(1), encoded.tokens], 1)


def _beside_timm(source: Source, model: ConvertedModel, clip: Tensor) -> Beside:
    reference = timm_model(source, model)
    features = reference.forward_features(_pixel_values(clip, model)[:, 0])
    encoded = _encoder(model)(clip)
    tokens = encoded.tokens
    if encoded.class_token is not None:
        tokens = torch.cat([encoded.class_token.unsqueeze(1), tokens], 1)
    return reference, "tokens", reference.fc_norm(features), tokens


def timm_model(source: Source, model: ConvertedModel) -> Any:
    """Returns timm's ViT with the source's weights, without the decoder that MAE has besides."""
    from timm.layers.activations import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    weights = {name: value for name, value in source.weights.items() if not name.startswith(IMAGE_DECODER)}
    width, depth, heads, mlp_ratio = model.encoder.sizes()
    activations: dict[str, Any] = {"gelu": nn.GELU, "gelu_tanh": "gelu_tanh", "quick_gelu": QuickGELU}
    reference = VisionTransformer(
        img_size=model.size,
        patch_size=model.encoder.tubelet[1:],
        num_classes=len(weights["head.bias"]) if "head.bias" in weights else 0,
        global_pool="token" if "cls_token" in weights else "avg",
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        qk_norm=model.encoder.qk_norm,
        init_values=model.encoder.layer_scale,
        class_token="cls_token" in weights,
        no_embed_class=weights["pos_embed"].shape[1] == model.grid.tokens,
        pre_norm=model.encoder.input_norm,
        fc_norm="fc_norm.weight" in weights,
        norm_layer=lambda channels, **kwargs: nn.LayerNorm(channels, eps=model.encoder.norm_eps, **kwargs),
        act_layer=activations[model.encoder.activation],
        weight_init="skip",
    )
    reference.load_state_dict(weights)
    return reference.eval()


def _transformers_model(name: str, source: Source) -> Any:
    """Returns a model of transformers with the source's weights; its loader knows the keys of its older releases."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, name)
    config = kind.config_class(**source.config)
    return kind.from_pretrained(None, config=config, state_dict=dict(source.weights), dtype=torch.float32).eval()


def _encoder(model: ConvertedModel) -> Encoder:
    has_token = "class_token" in model.weights
    encoder = build_encoder(model.encoder, model.frames, model.size, model.mean, model.std, has_token)
    encoder.load_state_dict(model.weights)
    return encoder.eval()


def _classifier(model: ConvertedModel) -> Classifier:
    assert model.head is not None, "only called for classifiers"
    head = model.head
    classifier = Classifier(_encoder(model), HeadConfig(pool=head.pool), len(head.weights["last.bias"]))
    places = HEAD_MODULES[head.pool].items()
    weights = {f"{place}.{part}": head.weights[f"{name}.{part}"] for name, place in places for part in PARTS}
    classifier.load_state_dict(weights, strict=False)
    return classifier.eval()


def _pixel_values(clip: Tensor, model: ConvertedModel) -> Tensor:
    """Returns clips `(B, T, C, H, W)` as the models' processors hand them over."""
    return ((clip / 255 - torch.tensor(model.mean)) / torch.tensor(model.std)).permute(0, 1, 4, 2, 3)
