"""The features of videos: what an encoder makes of the views of each, without any training on top."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pretrain.data.clips import ClipConfig
from pretrain.data.order import evaluation_slice
from pretrain.data.shards import ShardSet
from pretrain.data.views import EvaluationViews, Views, evaluation_batches
from pretrain.engine.distributed import Processes
from pretrain.errors import Refused, StoppedByRule
from pretrain.sets import refuse_stride_on_resampled

Encode = Callable[[list[Any]], Tensor]
"""From the views of some samples, as a dataset of views gives them, to features `(samples * views, ...)`."""


class VideoFeatures(NamedTuple):
    """The features of some videos.

    Attributes:
        values: `(videos, views, ...)`; those of a video that cannot be decoded mean nothing.
        labels: `(videos,)` class numbers, -1 where a video has none.
        keys: Their keys.
        errors: For each why it cannot be decoded, or None.
    """

    values: Tensor
    labels: Tensor
    keys: list[str]
    errors: list[str | None]

    def decoded(self) -> "VideoFeatures":
        """Returns the videos that can be decoded."""
        kept = [number for number, error in enumerate(self.errors) if error is None]
        return VideoFeatures(
            self.values[kept], self.labels[kept], [self.keys[number] for number in kept], [None] * len(kept)
        )

    def by_view(self) -> tuple[Tensor, Tensor]:
        """Returns features `(videos * views, ...)` and their labels: each view as a sample of its own."""
        return self.values.flatten(0, 1), self.labels.repeat_interleave(self.values.shape[1])


@torch.no_grad()
def encode_videos(
    encode: Encode, views: Dataset, numbers: np.ndarray, counted: np.ndarray, micro_batch: int, workers: int
) -> VideoFeatures:
    """Computes the features of videos, in this process alone.

    Args:
        encode: Makes features of views.
        views: A dataset of the videos' views.
        numbers: The numbers of the videos, at least one.
        counted: Which of them count; the others, which only keep ranks in step, are left out.
        micro_batch: Videos that go through the encoder at once.
        workers: Loader processes.
    """
    values: list[Tensor] = []
    seen: list[Any] = []
    for group in evaluation_batches(views, numbers, counted, micro_batch, workers):
        encoded = encode(group).unflatten(0, (len(group), -1)).cpu()
        values.append(encoded[[one.counted for one in group]])
        seen += [one for one in group if one.counted]
    labels = torch.tensor([one.label for one in seen], dtype=torch.int64)
    return VideoFeatures(torch.cat(values), labels, [one.key for one in seen], [one.error for one in seen])


def shared_features(
    encode: Encode, views: Dataset, chosen: np.ndarray, processes: Processes, micro_batch: int, workers: int
) -> VideoFeatures:
    """Computes the features of videos, each in one of the processes; every rank calls it and gets them all.

    Args:
        encode: Makes features of views; all ranks call it equally often.
        views: A dataset of the videos' views.
        chosen: The numbers of the videos.
        processes: All processes, which share the work.
        micro_batch: Videos that go through the encoder at once.
        workers: Loader processes of each.
    """
    numbers, counted = evaluation_slice(len(chosen), processes.world, processes.rank)
    own = encode_videos(encode, views, chosen[numbers], counted, micro_batch, workers)
    if processes.world == 1:
        return own
    return joined_features(processes.gather_objects(own))


def joined_features(parts: list[VideoFeatures]) -> VideoFeatures:
    """Returns the features of several parts of a set as one."""
    values, labels = torch.cat([part.values for part in parts]), torch.cat([part.labels for part in parts])
    keys, errors = [key for part in parts for key in part.keys], [error for part in parts for error in part.errors]
    return VideoFeatures(values, labels, keys, errors)


def mean_features_by(model: nn.Module, device: torch.device) -> Encode:
    """Returns what makes mean-pooled features `(samples * views, D)` of clips of one size.

    Args:
        model: Returns `Encoded` for clips.
        device: Where it computes.
    """

    def encode(group: list[Views]) -> Tensor:
        return model(torch.cat([one.clips for one in group]).to(device)).mean().float()

    return encode


def features(
    encoder: nn.Module, shards: ShardSet, clip: ClipConfig, micro_batch: int = 16, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Computes the features of every video of a set, from its middle clip.

    Args:
        encoder: The encoder; put into evaluation mode.
        shards: The videos.
        clip: The clips that the encoder sees.
        micro_batch: Videos that go through the encoder at once.
        workers: Loader processes.

    Returns:
        `(samples, D)` mean tokens and `(samples,)` labels, -1 where a video has none.

    Raises:
        Refused: A video cannot be decoded, or the clip's stride means nothing on this set.
        StoppedByRule: The encoder returns features that are not finite.
    """
    refuse_stride_on_resampled("shards", shards, clip)
    encode = mean_features_by(encoder.eval(), next(encoder.parameters()).device)
    everything = np.arange(shards.samples), np.full(shards.samples, True)
    found = encode_videos(encode, EvaluationViews(shards, clip), *everything, micro_batch, workers)
    for key, error in zip(found.keys, found.errors, strict=True):
        if error:
            raise Refused(f"{shards.folder}: {key} cannot be decoded ({error}); pack the videos anew")
    if not found.values.isfinite().all():
        raise StoppedByRule(f"{shards.folder}: the encoder's features are not finite; pretrain again")
    return found.values[:, 0], found.labels
