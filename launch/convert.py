"""`tubelet convert`: weights of other implementations become Tubelet's, and Tubelet's become theirs."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from finetune.classifier import save_classifier
from finetune.conversion import Preprocessing, as_classifier, read_model
from launch.parity import TOLERANCE, Comparison, compare
from launch.weight_files import read_json, read_source
from pretrain.data.clips import ClipConfig
from pretrain.errors import Refused, TubeletError
from pretrain.files import replacing, write_json
from pretrain.model.encoder import EncoderConfig
from pretrain.model.weights.inflation import InflationName, inflated, resized
from pretrain.model.weights.layouts import convert as convert_weights
from pretrain.model.weights.parts import ConvertedModel
from pretrain.model.weights.source import Weights
from pretrain.model.weights.videomae_out import to_videomae, videomae_processor
from pretrain.weights import describe_encoder, find_encoder, save_model_folder

logger = logging.getLogger(__name__)

IMAGE_FRAMES, IMAGE_TUBELET = 16, 2
"""Frames of a clip and of a tubelet that an image model gets if nothing else is asked for: VideoMAE's."""

FRAME_RATE = 7.5
"""Frames per second of a clip if nothing else is asked for: VideoMAE's on Kinetics."""


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """A conversion of weights."""

    source: str
    """Folder or file of a model: VideoMAE, ViViT or X-CLIP of Hugging Face, VideoMAE of MCG-NJU, ViT of timm, MAE, or
    a model or a run of Tubelet."""
    out: str
    """Folder to write, or for safetensors the file."""
    to: Literal["tubelet", "huggingface", "safetensors"] = "tubelet"
    """What to write: a model of Tubelet, one that transformers' VideoMAE classes load, or plain weights."""
    frames: int | None = None
    """Frames of a clip; else the source's, and 16 for image models."""
    size: int | None = None
    """Height and width of a clip in pixels; else the source's. Learned positions are interpolated."""
    tubelet: tuple[int, int, int] | None = None
    """Frames, height and width of a tubelet made of an image model's patches; else 2 frames of its patches."""
    inflation: InflationName | None = None
    """How an image model's patches become tubelets: in the central frame (if nothing is given), or on average over the
    frames."""
    frame_rate: float | None = None
    """Frames per second of the clips, which no source of others tells; else 7.5, stride 4 at 30 frames per second."""
    heads: int | None = None
    """Number of heads, where the source does not tell it and it is not the published one."""


def convert(config: ConvertConfig) -> ConvertedModel:
    """Converts weights, compares them with the reference implementation if it is installed, and writes them.

    Returns:
        What was written.

    Raises:
        Refused: The source cannot be read or is of an unknown layout, or a field does not fit it.
        TubeletError: The converted model computes something else than the reference.
    """
    source = Path(config.source)
    refuse_numbers(config)
    refuse_out(config)
    if is_tubelets(source):
        refuse_given(config, "a model of Tubelet tells it", "heads", "frame_rate")
        converted, told = read_model(find_encoder(config.source))
        if told.packing:
            refuse_given(config, "packed clips have no one size; pretrain or finetune with another", "frames", "size")
            write(converted, told, config)
            return converted
    else:
        read = read_source(source, config.heads)
        converted = convert_weights(read)
        logger.info(f"{source}: {converted.layout}, {describe(converted)}")
        for name in converted.left_out:
            logger.info(f"{name} is left out: it has no place in Tubelet's model")
        tell(compare(read, converted))
        told = Preprocessing(ClipConfig(frame_rate=FRAME_RATE if config.frame_rate is None else config.frame_rate))
    model = with_sizes(converted, config)
    clip = dataclasses.replace(told.clip, frames=model.frames, size=model.size[0], mean=model.mean, std=model.std)  # type: ignore[arg-type]
    write(model, told._replace(clip=clip), config)
    return model


def refuse_numbers(config: ConvertConfig) -> None:
    """Raises `Refused` for numbers that cannot be."""
    for name in ("frames", "size", "heads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise Refused(f"{name}: {value} must be at least 1")
    if config.frame_rate is not None and not 0 < config.frame_rate < math.inf:
        raise Refused(f"frame_rate: {config.frame_rate} must be finite and greater than 0")


def refuse_out(config: ConvertConfig) -> None:
    """Raises `Refused` if `out` is not what would be written, or holds something already."""
    out = Path(config.out)
    if config.to == "huggingface":
        refuse_given(config, "Hugging Face's VideoMAE has no place for it", "frame_rate")
    if (config.to == "safetensors") != (out.suffix == ".safetensors"):
        remedy = (
            "name a file NAME.safetensors" if config.to == "safetensors" else "name a folder, or give --to safetensors"
        )
        raise Refused(f"{out}: cannot be written as {config.to}; {remedy}")
    empty = out.is_dir() and not any(out.iterdir()) and config.to != "safetensors"
    if out.exists() and not empty:
        raise Refused(f"{out}: is there already; name another, or remove it")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise Refused(f"{out}: nothing can be written to {parent}; name another")


def refuse_given(config: ConvertConfig, why: str, *fields: str) -> None:
    """Raises `Refused` if a field is given that nothing would read."""
    for name in fields:
        if getattr(config, name) is not None:
            raise Refused(f"{name}: {why}; leave it out")


def is_tubelets(path: Path) -> bool:
    """Tells whether a folder holds a model, or a run, of Tubelet."""
    return any("format" in read_json(folder / "config.json") for folder in (path, path / "encoder", path / "model"))


def describe(model: ConvertedModel) -> str:
    """Returns in one line what a model is."""
    width, depth, heads, _ = model.encoder.sizes()
    clips = "images" if model.is_image else f"{model.frames} frames"
    return f"{depth} blocks of width {width} with {heads} heads, {clips} of {model.size[0]} x {model.size[1]} pixels"


def tell(comparison: Comparison | None) -> None:
    """Logs how far a model is from its reference; raises `TubeletError` if that is too far."""
    if comparison is None:
        logger.info("not compared: no installed package has a model of this layout")
        return
    fact = f"greatest difference from {comparison.reference} in {comparison.output}: {comparison.difference:.1e}"
    if not comparison.difference <= TOLERANCE:
        raise TubeletError(f"{fact}; more than {TOLERANCE:.0e} is not the same model, nothing was written")
    logger.info(f"{fact} (of values up to {comparison.greatest:.1e})")


def with_sizes(model: ConvertedModel, config: ConvertConfig) -> ConvertedModel:
    """Returns the model for the clips that are asked for; an image model becomes one of clips."""
    size = model.size if config.size is None else (config.size, config.size)
    if size[0] != size[1]:
        raise Refused(f"size: the model sees {size[0]} x {size[1]} pixels, Tubelet's clips are square; give --size")
    if not model.is_image:
        refuse_given(config, "only image models are inflated, and this one sees clips", "tubelet", "inflation")
        return resized(model, model.frames if config.frames is None else config.frames, size)
    patch = model.encoder.tubelet[1:]
    frames = IMAGE_FRAMES if config.frames is None else config.frames
    tubelet = (1 if frames == 1 else IMAGE_TUBELET, *patch) if config.tubelet is None else config.tubelet
    return inflated(resized(model, 1, size), frames, tubelet, config.inflation or "central")


def write(model: ConvertedModel, told: Preprocessing, config: ConvertConfig) -> None:
    """Writes a model in the form that is asked for, whole or not at all."""
    out = Path(config.out)
    if config.to == "huggingface":
        weights, content = to_videomae(model)
        with whole_folder(out) as folder:
            write_json(folder / "config.json", content)
            write_json(folder / "preprocessor_config.json", videomae_processor(model))
            write_weights(folder / "model.safetensors", weights, {"format": "pt"})
        logger.info(f"wrote {out}: transformers.{content['architectures'][0]}.from_pretrained loads it")
        return
    classes = None if model.head is None else model.head.classes
    if model.head is not None and (classes is None or config.to == "safetensors"):
        why = "the source has no names of its classes" if classes is None else "only the encoder is written"
        logger.info(f"the head is left out: {why}")
    if model.decoder is not None:
        logger.info("the decoder is left out: pretraining starts from the encoder, with a fresh decoder")
    description = describe_encoder(model.encoder, told.clip, told.packing)
    if config.to == "safetensors":
        write_weights(out, model.weights, {"encoder": json.dumps(description)})
        logger.info(f"wrote {out}: the encoder's weights")
        return
    with whole_folder(out) as folder:
        if classes is None:
            save_model_folder(folder, model.weights, description)
            how = f"start from it by `{pretraining_command(model, told, out)}`"
        else:
            save_classifier(folder, *as_classifier(model, told, classes))
            how = f"classify with it by `tubelet predict VIDEO --model {out}`"
    logger.info(f"wrote {out}; {how}, or by finetune --encoder")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `out`, which is empty if it is there; on success renames it to `out`."""
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_weights(path: Path, weights: Weights, metadata: dict[str, str]) -> None:
    """Writes a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, temporary, metadata)


def pretraining_command(model: ConvertedModel, told: Preprocessing, out: Path) -> str:
    """Returns the command that goes on pretraining, with the fields that are not the defaults."""
    fields: dict[str, Any] = {"encoder.variant": model.encoder.variant}
    usual = EncoderConfig(variant=model.encoder.variant).resolved()
    for group, ours, defaults in (("encoder", model.encoder.resolved(), usual), ("data.clip", told.clip, ClipConfig())):
        for name, value in dataclasses.asdict(ours).items():  # type: ignore[call-overload]
            if value != getattr(defaults, name):
                fields[f"{group}.{name}"] = value
    if told.packing:
        fields |= {f"data.packing.{name}": value for name, value in dataclasses.asdict(told.packing).items()}
    options = (
        f"--{name} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
        for name, value in fields.items()
    )
    return " ".join(["tubelet pretrain --init", shlex.quote(str(out)), *options])
