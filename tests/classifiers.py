"""Folders of tiny classifiers with fresh weights, for tests that need no training."""

from pathlib import Path
from typing import Literal

import torch

from finetune.classifier import ModelDescription, save_classifier
from finetune.config import HeadConfig
from pretrain.data.clips import ClipConfig
from pretrain.data.sequence_plan import PackingConfig
from pretrain.model.encoder import EncoderConfig, EncoderName
from pretrain.model.positions import PositionName


def tiny_classifier(
    folder: Path,
    encoder: EncoderName = "joint",
    pool: Literal["class_token", "mean", "attention"] = "class_token",
    positions: PositionName = "sincos",
    packing: PackingConfig | None = None,
) -> ModelDescription:
    """Writes a model folder; returns its description."""
    description = ModelDescription(
        EncoderConfig(
            encoder, "Ti", depth=1, width=48, heads=4, temporal_depth=1, tubelet=(2, 16, 16), positions=positions
        ),
        ClipConfig(frames=4, frame_rate=7.5, size=32),
        HeadConfig(pool=pool, hidden=(16,), init_scale=1.0),
        ("jump", "run", "sit"),
        short_side=36,
        frame_rate=None,
        packing=packing,
    )
    torch.manual_seed(0)
    save_classifier(folder, dict(description.build(description.build_encoder()).state_dict()), description)
    return description
