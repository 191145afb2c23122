"""Encoders on disk: a folder with `config.json` (architecture and preprocessing) and `model.safetensors`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.data.clips import ClipConfig
from pretrain.data.sequence_plan import ClipSizing, PackingConfig
from pretrain.errors import Refused
from pretrain.files import replacing, write_json
from pretrain.model.encoder import Encoder, EncoderConfig
from pretrain.model.encoders import build_encoder
from pretrain.model.tubelets import Size

FORMAT_VERSION = 1
LEARNED_AXES = ("separable", "factorised")
"""Learned positions that packed clips can have."""


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
    if description.get("format") != FORMAT_VERSION:
        raise Refused(
            f"{folder / 'config.json'}: has format {description.get('format')}, this Tubelet reads {FORMAT_VERSION}; "
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
    size: Size = clip.size
    if packing is not None:
        sizing = ClipSizing(clip, packing.aspect, config.tubelet)
        size = sizing.pixels(sizing.largest)
    return build_encoder(config, clip.frames, size, clip.mean, clip.std, class_token)


def configs_from(description: dict[str, Any], folder: Path) -> tuple[EncoderConfig, ClipConfig]:
    """Returns the architecture and the clip that a `config.json` describes."""
    try:
        return (
            EncoderConfig(**_with_tuples(description["encoder"])),
            ClipConfig(**_with_tuples(description["clip"])),
        )
    except (KeyError, TypeError) as error:
        raise Refused(f"{folder / 'config.json'}: does not describe an encoder ({error}); export it again") from None


def packing_from(description: dict[str, Any], folder: Path) -> PackingConfig | None:
    """Returns how the clips of the model that a `config.json` describes are packed; None where they are not."""
    if description.get("packing") is None:
        return None
    try:
        return PackingConfig(**description["packing"])
    except TypeError as error:
        raise Refused(f"{folder / 'config.json'}: does not describe packed clips ({error}); export it again") from None


def find_encoder(path: str) -> Path:
    """Returns the folder of an encoder.

    Args:
        path: That folder, or a pretraining run's.

    Raises:
        Refused: There is no encoder.
    """
    for folder in (Path(path) / "encoder", Path(path)):
        if (folder / "config.json").is_file():
            return folder
    raise Refused(f"{path}: holds no encoder; give a pretraining run or a folder with config.json")


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


def refuse_other_clip(folder: Path, found: ClipConfig, wanted: ClipConfig) -> None:
    """Raises `Refused` unless clips have the shape and the colours that the encoder in `folder` was pretrained with."""
    for name in ("frames", "size", "mean", "std"):
        if getattr(found, name) != getattr(wanted, name):
            raise Refused(
                f"data.clip.{name}: is {getattr(wanted, name)}, but the encoder in {folder} was pretrained with "
                f"{getattr(found, name)}; use that"
            )


def refuse_other_packing(
    folder: Path, positions: str, found: PackingConfig | None, wanted: PackingConfig | None
) -> None:
    """Refuses learned positions of an encoder that was pretrained on clips of other shapes.

    Positions that are computed mean the same in every grid, so such an encoder goes from packed clips to clips of one
    size and back.

    Args:
        folder: The encoder's folder.
        positions: Its position embedding.
        found: How its clips were packed; None where all had one size.
        wanted: How the run packs them.

    Raises:
        Refused: The tables of learned positions are of another size.
    """
    ours, theirs = (None if one is None else one.aspect for one in (wanted, found))
    if positions in LEARNED_AXES and ours != theirs:
        told = ["clips of one size" if one is None else f"packed clips up to aspect {one}" for one in (ours, theirs)]
        raise Refused(
            f"data.packing: asks for {told[0]}, but the encoder in {folder}, whose {positions} positions are learned, "
            f"was pretrained with {told[1]}; use that"
        )


def load_encoder_weights(encoder: Encoder, weights: dict[str, Tensor], folder: Path) -> None:
    """Puts pretrained weights into an encoder; a class token that was not pretrained keeps its fresh value.

    Args:
        encoder: The encoder, with fresh weights.
        weights: Pretrained weights by the encoder's own names.
        folder: Where they come from, to tell what is wrong.

    Raises:
        Refused: The weights belong to an encoder of another shape.
    """
    own = encoder.state_dict()
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


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
