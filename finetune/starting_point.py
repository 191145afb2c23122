"""What finetuning starts from: a pretrained encoder, found and fitted to the run's clips, or fresh weights."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from finetune.classifier import Classifier, ModelDescription
from finetune.config import FinetuneConfig
from pretrain.model.encoder import EncoderConfig
from pretrain.packing import validate_packed
from pretrain.weights import (
    find_encoder,
    fit_to_clips,
    load_encoder,
    load_encoder_weights,
    refuse_other_architecture,
)


class Start(NamedTuple):
    """What training starts from.

    Attributes:
        architecture: The encoder's architecture.
        folder: The pretrained encoder's folder; None from scratch.
        weights: Its weights; none from scratch.
    """

    architecture: EncoderConfig
    folder: Path | None
    weights: dict[str, Tensor]


def starting_point(config: FinetuneConfig) -> Start:
    """Returns the pretrained encoder that `config.encoder` names, or the architecture to train from scratch.

    Raises:
        Refused: The encoder is of another architecture, its clips are of another shape, or the architecture cannot be.
    """
    source = config.source()
    if isinstance(source, EncoderConfig):
        validate_architecture(config, source, "architecture")
        return Start(source.resolved(), None, {})
    folder = find_encoder(source)
    pretrained = load_encoder(folder)
    architecture = pretrained.architecture
    refuse_other_architecture("architecture", folder, architecture, config.architecture or architecture)
    validate_architecture(config, architecture, f"{folder / 'config.json'}: encoder")
    return Start(architecture, folder, fit_to_clips(pretrained, folder, config.data.clip, config.data.packing))


def validate_architecture(config: FinetuneConfig, architecture: EncoderConfig, field: str) -> None:
    """Raises `Refused` for an encoder that cannot be, or cannot see the run's clips; `field` is its name."""
    clip = config.data.clip
    if config.data.packing is None:
        architecture.validate(clip.frames, clip.size, field)
    else:
        validate_packed(config.data, architecture, field)


def build_classifier(description: ModelDescription, start: Start) -> Classifier:
    """Returns a classifier with a fresh head; raises `Refused` if the encoder's weights do not fit its description."""
    encoder = description.build_encoder()
    if start.folder:
        load_encoder_weights(encoder, start.weights, start.folder)
    return description.build(encoder)
