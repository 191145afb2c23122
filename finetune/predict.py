"""Prediction: the most probable classes of video files, in any format that FFmpeg reads.

A file goes the way of the training videos: transcoded as packing does, decoded, cut into views.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from finetune.classifier import ModelDescription, load
from finetune.config import ViewsConfig
from pretrain.data.packed_views import packed_views_of
from pretrain.data.shards import Sample
from pretrain.data.transcode import transcode
from pretrain.data.video import DecoderName
from pretrain.data.views import views_of
from pretrain.errors import BadSample, StoppedByRule
from pretrain.model.packing import PackedTokens
from pretrain.packing import visible_tokens

TOP = 5
GOP = 16


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The classes of one file.

    Attributes:
        file: The file.
        classes: (name, probability) of the most probable classes, best first; none where there is an error.
        error: Why the file has no classes, with the remedy, or None.
    """

    file: str
    classes: list[tuple[str, float]]
    error: str | None = None


def predict(
    model_folder: str, files: list[str], views: ViewsConfig | None = None, decoder: DecoderName = "auto"
) -> Iterator[Prediction]:
    """Predicts the classes of video files, one after the other.

    Args:
        model_folder: Model folder or finetuning run.
        files: Video files.
        views: Views of each video; by default three time windows.
        decoder: Who decodes the transcoded videos.

    Yields:
        The prediction for each file in turn; one for a file that cannot be read says so, and the next ones go on.

    Raises:
        Refused: The model cannot be read.
        StoppedByRule: The model returns logits that are not finite.
    """
    model, description = load(model_folder)
    views = views or ViewsConfig(temporal=3)
    if description.packing:
        views.refuse_crops(f"{model_folder} was trained on packed clips, of which each")
    for file in files:
        try:
            with torch.no_grad():
                logits = model(clips_of(file, description, views, decoder)).float().mean(0).flatten()
        except BadSample as error:
            yield Prediction(file, [], str(error))
            continue
        if not logits.isfinite().all():
            raise StoppedByRule(f"{file}: the logits of {model_folder} are not finite; finetune again")
        best = logits.softmax(0).topk(min(TOP, len(description.classes)))
        names = [description.classes[number] for number in best.indices.tolist()]
        yield Prediction(file, list(zip(names, best.values.tolist(), strict=True)))


def clips_of(
    file: str, description: ModelDescription, views: ViewsConfig, decoder: DecoderName = "auto"
) -> Tensor | PackedTokens:
    """Returns the views of a video file, upright, whichever decoder reads them.

    Returns:
        `(views, T, H, W, C)`, or for a model of packed clips a sequence for each view.

    Raises:
        BadSample: It has none; the message says why, with the remedy.
    """
    if not Path(file).is_file():
        raise BadSample("no such file; give video files")
    try:
        stored = transcode(file, short_side=description.short_side, gop=GOP, frame_rate=description.frame_rate)
        if description.packed:
            sizing = description.packed.sizing
            grid = sizing.grid(stored.frames, stored.frame_rate, stored.height, stored.width)
            views_packed = packed_views_of(
                stored.video, grid, stored.frame_rate, description.packed, views.temporal, decoder
            )
            return visible_tokens(views_packed)
        sample = Sample(Path(file).stem, stored.video, None, stored.frames, stored.frame_rate, {})
        return views_of(sample, description.clip, views.temporal, views.spatial, decoder)
    except BadSample as error:
        raise BadSample(f"cannot be decoded ({error}); give a video that plays") from None
