"""Encoders on disk: a folder with `config.json` (architecture and preprocessing) and `model.safetensors`."""

import dataclasses
import json
import logging
import types
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.data.clips import ClipConfig
from pretrain.data.sequence_plan import ClipSizing, PackingConfig
from pretrain.errors import Refused
from pretrain.files import replacing, write_json
from pretrain.model.encoder import Encoder, EncoderConfig
from pretrain.model.encoders import build_encoder
from pretrain.model.tubelets import Size, grid_of
from pretrain.model.weights.inflation import with_positions_for

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1

Described = TypeVar("Described")

LEARNED_AXES = ("separable", "factorised")
"""Learned positions that packed clips can have."""

WITHOUT_TABLES = ("sincos", "sincos_3d", "rotary")
"""Kinds of positions that are computed, so that no weights of theirs belong to a grid."""


def save_model_folder(folder: Path, weights: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Writes `config.json` and `model.safetensors`, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"format": FORMAT_VERSION} | description)
    with replacing(folder / "model.safetensors") as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, temporary)


def load_model_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_model_folder` wrote.

    Raises:
        Refused: A file is missing, damaged, or of a newer format.
    """
    try:
        description = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise Refused(
            f"{folder}: has no {Path(error.filename or 'model.safetensors').name}; give a model's folder"
        ) from None
    except (ValueError, SafetensorError, OSError) as error:
        raise Refused(f"{folder}: cannot be read ({error}); export the model again") from None
    found = description.get("format") if isinstance(description, dict) else None
    if found != FORMAT_VERSION:
        raise Refused(
            f"{folder / 'config.json'}: has format {found}, this Tubelet reads {FORMAT_VERSION}; "
            f"use the Tubelet that wrote it"
        )
    return weights, description


def describe_encoder(config: EncoderConfig, clip: ClipConfig, packing: PackingConfig | None = None) -> dict[str, Any]:
    """Returns the description of an encoder for `config.json`; `packing` is for one that sees packed clips."""
    description = {"encoder": dataclasses.asdict(config.resolved()), "clip": dataclasses.asdict(clip)}
    return description if packing is None else description | {"packing": dataclasses.asdict(packing)}


def encoder_from(
    config: EncoderConfig, clip: ClipConfig, class_token: bool = False, packing: PackingConfig | None = None
) -> Encoder:
    """Builds the encoder that sees clips of `clip`, or packed clips, whose positions reach as far as the largest."""
    size = largest_size(clip, config.tubelet, packing)
    return build_encoder(config, clip.frames, size, clip.mean, clip.std, class_token)


def largest_size(clip: ClipConfig, tubelet: tuple[int, int, int], packing: PackingConfig | None) -> Size:
    """Returns the size in pixels of clips, or of the largest packed ones."""
    if packing is None:
        return clip.size
    sizing = ClipSizing(clip, packing.aspect, tubelet)
    return sizing.pixels(sizing.largest)


def configs_from(description: dict[str, Any], folder: Path) -> tuple[EncoderConfig, ClipConfig]:
    """Returns the architecture and the clip that a `config.json` describes."""
    return described(EncoderConfig, description, "encoder", folder), described(ClipConfig, description, "clip", folder)


def packing_from(description: dict[str, Any], folder: Path) -> PackingConfig | None:
    """Returns how the clips of the model that a `config.json` describes are packed; None where they are not."""
    if description.get("packing") is None:
        return None
    return described(PackingConfig, description, "packing", folder)


def described(kind: type[Described], description: dict[str, Any], group: str, folder: Path) -> Described:
    """Returns a group of fields of a `config.json` as the dataclass `kind`.

    Raises:
        Refused: The group is not there, or a field of it is unknown or of another type.
    """
    values = description.get(group)
    if not isinstance(values, dict):
        raise Refused(f"{folder / 'config.json'}: {group} is not there; export the model again")
    hints = get_type_hints(kind)
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in found.items():
        if name not in hints or not _is_of_type(value, hints[name]):
            raise Refused(f"{folder / 'config.json'}: {group}.{name} cannot be {value!r}; export the model again")
    return kind(**found)


def _is_of_type(value: Any, hint: Any) -> bool:
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return value in parts
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_of_type(value, part) for part in parts)
    if get_origin(hint) is tuple:
        kinds = parts[:1] * len(value) if isinstance(value, tuple) and parts[1:] == (...,) else parts
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_of_type, value, kinds))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


class Pretrained(NamedTuple):
    """An encoder from a model folder.

    Attributes:
        weights: Its weights by its own names.
        architecture: Its architecture.
        clip: The clips that it was trained on.
        packing: How they were packed; None where all had one size.
    """

    weights: dict[str, Tensor]
    architecture: EncoderConfig
    clip: ClipConfig
    packing: PackingConfig | None


def find_encoder(path: str) -> Path:
    """Returns the folder of an encoder.

    Args:
        path: That folder, or a pretraining run's; or a classifier's, or a finetuning run's.

    Raises:
        Refused: There is no encoder.
    """
    for folder in (Path(path) / "encoder", Path(path) / "model", Path(path)):
        if (folder / "config.json").is_file():
            return folder
    raise Refused(f"{path}: holds no encoder; give a pretraining run or a folder with config.json")


def load_encoder(folder: Path) -> Pretrained:
    """Reads an encoder, or the encoder of a classifier.

    Where a classifier's norm stands behind the mean, it becomes the encoder's last norm.

    Args:
        folder: The folder that `find_encoder` returned.

    Raises:
        Refused: A file is missing, damaged, or of a newer format.
    """
    weights, description = load_model_folder(folder)
    architecture, clip = configs_from(description, folder)
    packing = packing_from(description, folder)
    if "classes" not in description:
        return Pretrained(weights, architecture, clip, packing)
    encoder = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    head = description.get("head")
    if isinstance(head, dict) and head.get("pool") == "mean":
        norm = {f"{last_norm(architecture)}.{part}": weights.get(f"head.0.{part}") for part in ("weight", "bias")}
        encoder |= {name: value for name, value in norm.items() if value is not None}
    logger.info(f"{folder}: is a classifier; its head is left out")
    return Pretrained(encoder, architecture, clip, packing)


def last_norm(architecture: EncoderConfig) -> str:
    """Returns the name of the encoder's norm in whose place a classifier with mean pooling has one behind the mean."""
    return "temporal_norm" if architecture.name == "factorised_encoder" else "norm"


def refuse_other_architecture(field: str, folder: Path, found: EncoderConfig, wanted: EncoderConfig) -> None:
    """Refuses an encoder whose weights mean something else in another architecture, even where their shapes agree.

    Args:
        field: The field that describes the wanted architecture.
        folder: The encoder's folder.
        found: Its architecture.
        wanted: The architecture to put its weights into.

    Raises:
        Refused: The two differ in more than drop path.
    """
    found, wanted = found.resolved(), wanted.resolved()
    for name in (one.name for one in dataclasses.fields(EncoderConfig)):
        ours, theirs = getattr(wanted, name), getattr(found, name)
        if name not in ("drop_path", "variant") and ours != theirs:
            raise Refused(f"{field}.{name}: is {ours}, but the encoder in {folder} has {theirs}; use that")


def fit_to_clips(
    pretrained: Pretrained, folder: Path, clip: ClipConfig, packing: PackingConfig | None = None
) -> dict[str, Tensor]:
    """Returns an encoder's weights for clips of other frames or size; learned positions are interpolated.

    Sine-cosine and rotary positions have no weights and know every grid.

    Args:
        pretrained: The encoder.
        folder: Where it comes from, to tell what is done or wrong.
        clip: The clips that it is wanted for; they divide into tubelets.
        packing: How they are packed; None where all have one size.

    Raises:
        Refused: The clips have other colours, or other shapes than learned positions can follow.
    """
    found = pretrained.clip
    for name in ("mean", "std"):
        if getattr(found, name) != getattr(clip, name):
            raise Refused(
                f"data.clip.{name}: is {getattr(clip, name)}, but the encoder in {folder} was pretrained with "
                f"{getattr(found, name)}; use that"
            )
    _refuse_other_packing(pretrained, folder, packing)
    if (found.frames, found.size) == (clip.frames, clip.size):
        return pretrained.weights
    kind, tubelet = pretrained.architecture.positions, pretrained.architecture.tubelet
    how = f"its {kind} positions are {'computed' if kind in WITHOUT_TABLES else 'interpolated'} for clips of"
    logger.info(
        f"{folder}: was trained on clips of {found.frames} frames of {found.size} pixels; {how} {clip.frames} frames "
        f"of {clip.size} pixels"
    )
    old = grid_of(found.frames, largest_size(found, tubelet, pretrained.packing), tubelet)
    new = grid_of(clip.frames, largest_size(clip, tubelet, packing), tubelet)
    try:
        return with_positions_for(pretrained.weights, old, new)
    except RuntimeError:
        raise Refused(f"{folder}: its positions do not fit its config.json; export the encoder again") from None


def _refuse_other_packing(pretrained: Pretrained, folder: Path, packing: PackingConfig | None) -> None:
    """Refuses learned positions of an encoder that was pretrained on clips of other shapes.

    Positions that are computed mean the same in every grid, so such an encoder goes from packed clips to clips of one
    size and back.
    """
    positions = pretrained.architecture.positions
    ours, theirs = (None if one is None else one.aspect for one in (packing, pretrained.packing))
    if positions in LEARNED_AXES and ours != theirs:
        told = ["clips of one size" if one is None else f"packed clips up to aspect {one}" for one in (ours, theirs)]
        raise Refused(
            f"data.packing: asks for {told[0]}, but the encoder in {folder}, whose {positions} positions are learned, "
            f"was pretrained with {told[1]}; use that"
        )


def load_encoder_weights(encoder: Encoder, weights: dict[str, Tensor], folder: Path) -> None:
    """Puts pretrained weights into an encoder.

    A class token that was not pretrained keeps its fresh value; one that the encoder has no use for is left out, and
    the log says so.

    Args:
        encoder: The encoder, with fresh weights.
        weights: Pretrained weights by the encoder's own names.
        folder: Where they come from, to tell what is wrong.

    Raises:
        Refused: The weights belong to an encoder of another shape.
    """
    own = encoder.state_dict()
    if "class_token" in weights and "class_token" not in own:
        logger.info(f"{folder}: class_token is left out: nothing reads it here (head.pool class_token does)")
        weights = {name: value for name, value in weights.items() if name != "class_token"}
    fresh = {"class_token"} - set(weights)
    missing = sorted(set(own) - set(weights) - fresh)
    surplus = sorted(set(weights) - set(own))
    differing = sorted(name for name in set(own) & set(weights) if own[name].shape != weights[name].shape)
    for names, what in ((missing, "lacks"), (surplus, "has the additional"), (differing, "has another shape of")):
        if names:
            raise Refused(
                f"{folder}: is an encoder of another shape: it {what} {names[0]} ({len(names)} such weights); "
                f"configure the architecture that it was trained with"
            )
    encoder.load_state_dict(weights, strict=False)
    encoder.has_class_tokens = "class_token" in weights
