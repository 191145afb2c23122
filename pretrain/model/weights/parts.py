"""What the layouts share: a converted model, and the parts that all transformers have."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pretrain.errors import Refused
from pretrain.model.attention import BiasName
from pretrain.model.blocks import ActivationName
from pretrain.model.encoder import VARIANTS, EncoderConfig
from pretrain.model.mae import DecoderConfig
from pretrain.model.tubelets import Grid, grid_of
from pretrain.model.weights.source import Source, Weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

IMAGE_LAYOUT = "timm ViT, MAE"
"""The layout of image models."""

ACTIVATIONS: dict[str, ActivationName] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
"""transformers' names of activations."""


class Head(NamedTuple):
    """A classifier's head.

    Attributes:
        pool: What it reads.
        weights: `norm.weight` and `norm.bias` `(D,)` of a layer norm before the last layer, if there is one, and
            `last.weight` `(classes, D)` and `last.bias`.
        classes: Names of the classes; None where the source has none.
    """

    pool: Literal["class_token", "mean"]
    weights: Weights
    classes: tuple[str, ...] | None


class Decoder(NamedTuple):
    """A masked autoencoder's decoder: its configuration, and its weights by the autoencoder's names."""

    config: DecoderConfig
    weights: Weights


@dataclasses.dataclass(frozen=True)
class ConvertedModel:
    """Weights by our names.

    Attributes:
        layout: The layout that they came in.
        encoder: The encoder's architecture.
        frames: Frames of a clip; of an image model 1, until it is inflated.
        size: Height and width of a clip in pixels.
        mean: Mean of each colour channel, for values in [0, 1].
        std: Standard deviation of each colour channel.
        weights: The encoder's weights; a class token has the position that belongs to it added.
        head: The classifier's head, if there is one.
        decoder: The decoder, if there is one.
        left_out: What the source holds besides.
    """

    layout: str
    encoder: EncoderConfig
    frames: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: Weights
    head: Head | None = None
    decoder: Decoder | None = None
    left_out: tuple[str, ...] = ()

    @property
    def grid(self) -> Grid:
        """The token grid of a clip."""
        return grid_of(self.frames, self.size, self.encoder.tubelet)

    @property
    def is_image(self) -> bool:
        """Whether the model came as one of images."""
        return self.layout == IMAGE_LAYOUT


class AttentionNames(NamedTuple):
    """What a layout with separate projections calls those of an attention layer."""

    query: str
    key: str
    value: str
    projection: str


def sizes(width: int, depth: int, heads: int, hidden: int) -> dict[str, Any]:
    """Returns the fields of `EncoderConfig` for these sizes, with the published variant's name where it is one.

    Args:
        width: Width of a token.
        depth: Number of blocks.
        heads: Number of heads.
        hidden: Width of the MLP's hidden layer.
    """
    fields = {"width": width, "depth": depth, "heads": heads, "mlp_ratio": hidden / width}
    same = [name for name, one in VARIANTS.items() if tuple(one) == tuple(fields.values())]
    return {"variant": same[0] if same else "B", **fields}


def heads_of(source: Source, width: int, depth: int) -> int:
    """Returns the number of heads: as the source's configuration or the caller says, else the published one.

    Where neither says it, a published width and depth has its published heads, and others have heads of 64 channels.

    Raises:
        Refused: It cannot be told, or two of them contradict each other.
    """
    told = source.setting("num_attention_heads", int) if "num_attention_heads" in source.config else None
    if told and source.heads and told != source.heads:
        raise Refused(f"heads: is {source.heads}, but {source.name} has {told} (config.json); leave it out")
    published = [one.heads for one in VARIANTS.values() if (one.width, one.depth) == (width, depth)]
    heads = told or source.heads or (published[0] if published else width // 64 if width % 64 == 0 else 0)
    if heads and width % heads:
        raise Refused(f"heads: {heads} do not divide the tokens of {source.name}, which are {width} wide; give its own")
    if not heads:
        raise Refused(f"heads: those of {source.name}, whose tokens are {width} wide, cannot be told; give --heads")
    return heads


def activation_of(name: str, source: Source) -> ActivationName:
    """Returns our name of transformers' activation `name`; raises `Refused` if we do not have it."""
    if name not in ACTIVATIONS:
        raise Refused(f"{source.name}: config.json has hidden_act {name}; Tubelet has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def pair(value: Any) -> tuple[int, int]:
    """Returns height and width from one number or two."""
    height, width = value if isinstance(value, list | tuple) else (value, value)
    return int(height), int(width)


def colours(
    source: Source, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and the standard deviation by which values in [0, 1] are normalised.

    Args:
        source: Its `preprocessor_config.json` decides if there is one: transformers computes
            (value in 0 .. 255 * rescale_factor - offset - image_mean) / image_std.
        mean: The mean if there is none.
        std: The standard deviation if there is none.
    """
    processor = source.processor
    if "image_mean" not in processor:
        return _three(source, "mean", mean), _three(source, "std", std)
    factor = 255 * processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 255
    if not factor > 0:
        raise Refused(f"{source.name}: preprocessor_config.json has rescale_factor {factor / 255}; download it again")
    offset = 1 if processor.get("offset") else 0
    normalises = processor.get("do_normalize", True)
    means = _three(source, "image_mean", processor["image_mean"] if normalises else [0.0] * 3)
    deviations = _three(source, "image_std", processor.get("image_std") if normalises else [1.0] * 3)
    return (
        tuple(round((offset + one) / factor, 9) for one in means),
        tuple(round(one / factor, 9) for one in deviations),
    )


def _three(source: Source, name: str, values: Any) -> tuple[float, ...]:
    """Returns the three values of the colour channels; raises `Refused` if they are none, or a deviation is not > 0."""
    numbers = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
    if not numbers or len(values) != 3 or ("std" in name and min(values) <= 0):
        raise Refused(f"{source.name}: its configuration has {name} {values!r}, not one for each colour; give its own")
    return tuple(values)


def modules(source: Source, names: Mapping[str, str], ours: str = "") -> Weights:
    """Takes weight and bias of modules.

    Args:
        source: Where they are.
        names: Their names there by our names.
        ours: What our names begin with.
    """
    return {f"{ours}{our}.{part}": source.take(f"{theirs}.{part}") for our, theirs in names.items() for part in PARTS}


PARTS = ("weight", "bias")


def embedding(source: Source, name: str) -> Weights:
    """Takes a convolution `(D, C, t, h, w)` or `(D, C, h, w)` as the projection of tubelets; without bias it is 0."""
    kernel = source.take(f"{name}.weight")
    if kernel.ndim == 4:
        kernel = kernel.unsqueeze(2)
    bias = source.take(f"{name}.bias") if f"{name}.bias" in source else kernel.new_zeros(len(kernel))
    return {"embedding.projection.weight": flat_kernel(kernel), "embedding.projection.bias": bias}


def tubelet_of(kernel: Tensor) -> tuple[int, int, int]:
    """Returns frames, height and width of tubelets embedded by a kernel `(D, C, t, h, w)` or `(D, C, h, w)`."""
    *frames, height, width = kernel.shape[2:]
    return (frames[0] if frames else 1, height, width)


def flat_kernel(kernel: Tensor) -> Tensor:
    """Returns a convolution's kernel `(D, C, t, h, w)` as the matrix `(D, P)` of a projection of tubelets."""
    return kernel.permute(0, 2, 3, 4, 1).flatten(1)


def biases_of(source: Source, *, key_bias: str) -> BiasName:
    """Returns which of queries, keys and values have biases, told by the presence of `key_bias`; none are zeros."""
    return "all" if key_bias in source else "query_value"


def separate_attention(source: Source, names: AttentionNames, ours: str = "attention.") -> Weights:
    """Takes an attention layer whose projections are separate; biases that it does not have are 0."""
    query, key, value = (source.take(f"{name}.weight") for name in names[:3])
    weights = {f"{ours}qkv.weight": torch.cat([query, key, value])}
    for our, theirs in zip(("query_bias", "key_bias", "value_bias"), names[:3], strict=True):
        if f"{theirs}.bias" in source:
            weights[ours + our] = source.take(f"{theirs}.bias")
        elif our != "key_bias":
            weights[ours + our] = query.new_zeros(len(query))
    return weights | modules(source, {"projection": names.projection}, ours)


def fused_attention(source: Source, name: str, ours: str = "attention.") -> Weights:
    """Takes an attention layer of timm or MCG-NJU with one projection; biases that it does not have are 0."""
    qkv = source.take(f"{name}.qkv.weight")
    if f"{name}.qkv.bias" in source:
        biases = dict(
            zip(("query_bias", "key_bias", "value_bias"), source.take(f"{name}.qkv.bias").chunk(3), strict=True)
        )
    elif f"{name}.q_bias" in source:
        biases = {"query_bias": source.take(f"{name}.q_bias"), "value_bias": source.take(f"{name}.v_bias")}
    else:
        biases = {one: qkv.new_zeros(qkv.shape[1]) for one in ("query_bias", "value_bias")}
    weights = {f"{ours}qkv.weight": qkv} | {ours + one: value for one, value in biases.items()}
    return weights | modules(source, {"projection": f"{name}.proj"}, ours)


def class_names(source: Source, classes: int) -> tuple[str, ...] | None:
    """Returns the names of the classes that the source's configuration holds, in the order of their numbers."""
    names = source.config.get("id2label")
    if not isinstance(names, dict) or {str(number) for number in names} != {str(number) for number in range(classes)}:
        return None
    by_number = {str(number): str(name) for number, name in names.items()}
    return tuple(by_number[str(number)] for number in range(classes))
