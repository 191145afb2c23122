"""The model that a run would train, without its weights, and micro-batches of the shape that it trains on."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from finetune.adapters import add_adapters
from finetune.classifier import Classifier, ModelDescription
from finetune.config import FinetuneConfig
from finetune.freezing import freeze
from finetune.objective import build_objective
from finetune.starting_point import starting_point
from pretrain.config import PretrainConfig, RunConfig
from pretrain.data.loader import Batch
from pretrain.data.packed_clips import PackedBatch
from pretrain.data.randomness import key_for
from pretrain.data.sequence_plan import Packing
from pretrain.data.training_clips import Costs
from pretrain.engine.activations import Loss
from pretrain.model.encoder import EncoderConfig
from pretrain.model.masking import draw_mask
from pretrain.packing import decoded_tokens, packing_of, visible_tokens
from pretrain.pretraining import build_autoencoder, reconstruction_loss


class TrainedModel(NamedTuple):
    """What a run trains.

    Attributes:
        architecture: The encoder's.
        build: Returns the model with fresh weights, on torch's default device.
        batch: Returns a micro-batch of so many samples in memory, with random pixels.
        loss: Computes the loss of a batch.
        group: Samples that cannot be taken apart: those of a packed sequence, or one.
        parts: What the model is made of, by the first part of its parameters' names; the last takes the rest.
    """

    architecture: EncoderConfig
    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss: Loss
    group: int
    parts: tuple[str, str]

    def on_meta(self) -> nn.Module:
        """Returns the model on the meta device, where it takes no memory."""
        with torch.device("meta"):
            return self.build()

    def parameters(self, model: nn.Module) -> dict[str, int]:
        """Returns the number of parameters in each part of a model that `build` returned, the frozen ones included."""
        first, rest = self.parts
        counts = {first: 0, rest: 0}
        for name, parameter in model.named_parameters():
            counts[first if name.startswith(f"{first}.") else rest] += parameter.numel()
        return counts


def pretrained_model(config: PretrainConfig) -> TrainedModel:
    """Returns what a valid pretraining configuration trains."""

    def batch(samples: int) -> Batch | PackedBatch:
        if config.data.packing is not None:
            return _packed_batch(config, packing_of(config.data, config.encoder.tubelet, config.mask), samples)
        clips = samples * config.data.repeats
        drawn = [draw_mask(config.mask, config.grid, key_for(clip), key_for(clip, 1)) for clip in range(clips)]
        visible, masked = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
        return _batch(config, samples)._replace(visible=visible, masked=masked)

    def packed_loss(model: nn.Module, packed: PackedBatch) -> torch.Tensor:
        return model(visible_tokens(packed), decoded_tokens(packed)).loss.sum()

    return TrainedModel(
        config.encoder,
        lambda: build_autoencoder(config),
        batch,
        packed_loss if config.data.packing else reconstruction_loss,
        config.data.packing.group if config.data.packing else 1,
        ("encoder", "decoder"),
    )


def finetuned_model(config: FinetuneConfig, classes: int) -> TrainedModel:
    """Returns what a valid finetuning configuration trains for so many classes.

    Raises:
        Refused: The encoder to start from cannot be read or is another one.
    """
    data, start = config.data, starting_point(config)
    architecture = dataclasses.replace(start.architecture, drop_path=config.drop_path)
    names = tuple(map(str, range(classes)))
    description = ModelDescription(architecture, data.clip, config.head, names, data.clip.size, None, data.packing)

    def batch(samples: int) -> Batch | PackedBatch:
        if description.packed is not None:
            return _packed_batch(config, description.packed, samples)
        return _batch(config, samples)

    def classifier() -> Classifier:
        built = description.build(description.build_encoder())
        add_adapters(built, config.lora, config.freeze)
        freeze(built, config.freeze)
        return built

    # Mixed clips cost the model what others cost.
    unmixed = dataclasses.replace(config.mixing, mixup=0.0, cutmix=0.0)
    return TrainedModel(
        start.architecture,
        classifier,
        batch,
        build_objective(unmixed, data.clip, classes, packed=bool(data.packing)),
        data.packing.group if data.packing else 1,
        ("encoder", "head"),
    )


def _batch(config: RunConfig, samples: int) -> Batch:
    clip, clips = config.data.clip, samples * config.data.repeats
    pixels = torch.randint(256, (clips, clip.frames, clip.size, clip.size, len(clip.mean)), dtype=torch.uint8)
    none = torch.empty(clips, 0, dtype=torch.int64)
    return Batch(pixels, torch.zeros(clips, dtype=torch.int64), none, none, [], 0, [])


def _packed_batch(config: RunConfig, packing: Packing, samples: int) -> PackedBatch:
    """Returns sequences that are full."""
    sequences = samples * config.data.repeats // packing.group
    values = int(np.prod(packing.sizing.tubelet)) * len(config.data.clip.mean)

    def tokens(places: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        segments = torch.arange(places) * packing.group // max(places, 1)
        return (
            torch.randint(256, (sequences, places, values), dtype=torch.uint8),
            torch.zeros(sequences, places, 3, dtype=torch.int64),
            segments.expand(sequences, -1).contiguous(),
        )

    return PackedBatch(
        *tokens(packing.tokens),
        *tokens(packing.decoded),
        labels=torch.zeros(sequences, packing.group, dtype=torch.int64),
        decoded_in_step=torch.tensor(sequences * packing.decoded),
        keys=[],
        padded=0,
        skipped=[],
        costs=Costs(),
    )
