"""Prediction: the most probable classes of video files, in any format that FFmpeg reads.

A file goes the way of the training videos: transcoded as packing does, decoded, cut into views.
"""

import dataclasses
from pathlib import Path

import torch

from finetune.classifier import load
from finetune.config import ViewsConfig
from pretrain.data.loader import views_of
from pretrain.data.shards import Sample
from pretrain.data.transcode import transcode
from pretrain.errors import BadSample, Refused

TOP = 5
GOP = 16


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The classes of one file.

    Attributes:
        file: The file.
        classes: (name, probability) of the most probable classes, best first.
    """

    file: str
    classes: list[tuple[str, float]]


def predict(model_folder: str, files: list[str], views: ViewsConfig | None = None) -> list[Prediction]:
    """Predicts the classes of video files.

    Raises:
        Refused: The model cannot be read, or a file is missing or cannot be decoded.
    """
    model, description = load(model_folder)
    views = views or ViewsConfig(temporal=3)
    for file in files:
        if not Path(file).is_file():
            raise Refused(f"{file}: no such file; give video files")
    predictions = []
    for file in files:
        try:
            stored = transcode(file, short_side=description.short_side, gop=GOP, frame_rate=description.frame_rate)
            sample = Sample(Path(file).stem, stored.video, None, stored.frames, stored.frame_rate, {})
            clips = views_of(sample, description.clip, views.temporal, views.spatial)
        except BadSample as error:
            raise Refused(f"{file}: cannot be decoded ({error}); give a video that plays") from None
        with torch.no_grad():
            probabilities = model(clips).float().mean(0).softmax(0)
        best = probabilities.topk(min(TOP, len(description.classes)))
        predictions.append(
            Prediction(
                file,
                [
                    (description.classes[number], share)
                    for share, number in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                ],
            )
        )
    return predictions
