"""Classifiers between Tubelet's model folders and the weights of other implementations."""

from pathlib import Path

from finetune.classifier import ModelDescription
from finetune.config import HeadConfig
from pretrain.data.clips import ClipConfig
from pretrain.errors import Refused
from pretrain.model.weights.parts import PARTS, ConvertedModel, Head
from pretrain.model.weights.source import Weights
from pretrain.weights import configs_from, load_model_folder

HEAD_MODULES = {"mean": {"norm": "head.0", "last": "head.2"}, "class_token": {"last": "head.1"}}
"""Where a classifier without hidden layers has its head's modules, by its pooling."""

LAST_NORM = tuple(f"norm.{part}" for part in PARTS)


def as_classifier(
    model: ConvertedModel, clip: ClipConfig, classes: tuple[str, ...]
) -> tuple[Weights, ModelDescription]:
    """Returns a classifier's weights and description.

    Args:
        model: A model with a head.
        clip: The clips that it sees.
        classes: Names of its classes.
    """
    assert model.head is not None, "a classifier has a head"
    head = {
        f"{module}.{part}": model.head.weights[f"{name}.{part}"]
        for name, module in HEAD_MODULES[model.head.pool].items()
        for part in PARTS
    }
    without = LAST_NORM if model.head.pool == "mean" else ()
    encoder = {f"encoder.{name}": weight for name, weight in model.weights.items() if name not in without}
    description = ModelDescription(model.encoder, clip, HeadConfig(pool=model.head.pool), classes, clip.size, None)
    return encoder | head, description


def read_model(folder: Path) -> tuple[ConvertedModel, ClipConfig]:
    """Reads an encoder or a classifier that Tubelet wrote.

    Raises:
        Refused: The folder is damaged, or holds a head that other implementations have no names for.
    """
    weights, content = load_model_folder(folder)
    encoder, clip = configs_from(content, folder)
    head = None
    if "classes" in content:
        weights, head = _taken_apart(weights, content, folder)
    size = (clip.size, clip.size)
    return ConvertedModel("Tubelet", encoder, clip.frames, size, clip.mean, clip.std, weights, head), clip


def _taken_apart(weights: Weights, content: dict, folder: Path) -> tuple[Weights, Head]:
    pool = content.get("head", {}).get("pool")
    if pool not in HEAD_MODULES or content["head"].get("hidden"):
        raise Refused(
            f"{folder}: its head is of Tubelet's own design (head.pool {pool}, head.hidden "
            f"{content.get('head', {}).get('hidden')}); convert a classifier of one linear layer"
        )
    head = {
        f"{name}.{part}": weights[f"{module}.{part}"] for name, module in HEAD_MODULES[pool].items() for part in PARTS
    }
    encoder = {name.removeprefix("encoder."): weight for name, weight in weights.items() if name.startswith("encoder.")}
    if pool == "mean":
        encoder |= {name: head[name] for name in LAST_NORM}
    return encoder, Head(pool, head, tuple(content["classes"]))
