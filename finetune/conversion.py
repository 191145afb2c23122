"""Classifiers between Tubelet's model folders and the weights of other implementations."""

from pathlib import Path
from typing import NamedTuple

from finetune.classifier import ModelDescription
from finetune.config import HeadConfig
from pretrain.data.clips import ClipConfig
from pretrain.data.sequence_plan import PackingConfig
from pretrain.errors import Refused
from pretrain.model.encoder import EncoderConfig
from pretrain.model.weights.layouts import check
from pretrain.model.weights.parts import PARTS, ConvertedModel, Head
from pretrain.model.weights.source import Weights
from pretrain.weights import configs_from, described, largest_size, last_norm, load_model_folder, packing_from

HEAD_MODULES = {"mean": {"norm": "head.0", "last": "head.2"}, "class_token": {"last": "head.1"}}
"""Where a classifier without hidden layers has its head's modules, by its pooling."""


class Preprocessing(NamedTuple):
    """What a model's `config.json` tells besides its weights.

    Attributes:
        clip: The clips that it sees.
        packing: How they are packed; None where all have one size.
        head: Its head, of a classifier; None lets the weights tell.
        short_side: Short side of the stored videos that a classifier was trained on; None is that of the clips.
        frame_rate: Their frame rate if packing set one, else None.
    """

    clip: ClipConfig
    packing: PackingConfig | None = None
    head: HeadConfig | None = None
    short_side: int | None = None
    frame_rate: float | None = None


def as_classifier(
    model: ConvertedModel, told: Preprocessing, classes: tuple[str, ...]
) -> tuple[Weights, ModelDescription]:
    """Returns a classifier's weights and description.

    Args:
        model: A model with a head.
        told: The clips that it sees, and what else is known.
        classes: Names of its classes.
    """
    assert model.head is not None, "a classifier has a head"
    head = {
        f"{module}.{part}": model.head.weights[f"{name}.{part}"]
        for name, module in HEAD_MODULES[model.head.pool].items()
        for part in PARTS
    }
    without = last_norm(model.encoder) + "." if model.head.pool == "mean" else None
    encoder = {
        f"encoder.{name}": weight
        for name, weight in model.weights.items()
        if without is None or not name.startswith(without)
    }
    description = ModelDescription(
        model.encoder,
        told.clip,
        told.head or HeadConfig(pool=model.head.pool),
        classes,
        told.short_side or told.clip.size,
        told.frame_rate,
        told.packing,
    )
    return encoder | head, description


def read_model(folder: Path) -> tuple[ConvertedModel, Preprocessing]:
    """Reads an encoder or a classifier that Tubelet wrote.

    Raises:
        Refused: The folder is damaged, or holds a head that other implementations have no names for.
    """
    weights, content = load_model_folder(folder)
    encoder, clip = configs_from(content, folder)
    told, head = Preprocessing(clip, packing_from(content, folder)), None
    if "classes" in content:
        config = described(HeadConfig, content, "head", folder)
        weights, head = _taken_apart(weights, encoder, config, tuple(content["classes"]), folder)
        told = told._replace(head=config, short_side=content.get("short_side"), frame_rate=content.get("frame_rate"))
    size = largest_size(clip, encoder.tubelet, told.packing)
    sides = (size, size) if isinstance(size, int) else size
    model = ConvertedModel("Tubelet", encoder, clip.frames, sides, clip.mean, clip.std, weights, head)
    check(model, str(folder))
    return model, told


def _taken_apart(
    weights: Weights, architecture: EncoderConfig, config: HeadConfig, classes: tuple[str, ...], folder: Path
) -> tuple[Weights, Head]:
    pool = config.pool
    if pool not in HEAD_MODULES or config.hidden:
        raise Refused(
            f"{folder}: its head is of Tubelet's own design (head.pool {pool}, head.hidden {list(config.hidden)}); "
            f"convert a classifier of one linear layer"
        )
    assert pool != "attention", "it is none of HEAD_MODULES"
    places = {f"{name}.{part}": f"{module}.{part}" for name, module in HEAD_MODULES[pool].items() for part in PARTS}
    lacking = [place for place in places.values() if place not in weights]
    if lacking:
        raise Refused(f"{folder}: lacks {lacking[0]}; export the model again")
    head = {name: weights[place] for name, place in places.items()}
    encoder = {name.removeprefix("encoder."): weight for name, weight in weights.items() if name.startswith("encoder.")}
    if pool == "mean":
        encoder |= {f"{last_norm(architecture)}.{part}": head[f"norm.{part}"] for part in PARTS}
    return encoder, Head(pool, head, classes)
