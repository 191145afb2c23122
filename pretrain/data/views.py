"""The views of evaluation samples: time windows and crops of each, decoded once."""

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from pretrain.data.clips import ClipConfig, cut, view_box, view_frames
from pretrain.data.decode_client import DECODE_LIMIT_S, open_video_apart
from pretrain.data.loader import load_batches
from pretrain.data.shards import Sample, ShardSet
from pretrain.data.video import DecoderName, VideoReader, open_video
from pretrain.errors import BadSample

HELD_OUT_SET = 1  # the set number that keys the fixed masks of held-out clips
Cut = TypeVar("Cut")


class Views(NamedTuple):
    """The views of one evaluation sample.

    Attributes:
        sample: The sample number.
        clips: `(views, T, H, W, C)` uint8; zeros where the sample cannot be decoded.
        label: Its class number, or its class numbers in a multi-label set; -1 in an unlabelled one.
        key: Its key.
        error: Why it cannot be decoded, or None.
        counted: False for a filler that only keeps ranks in step.
    """

    sample: int
    clips: torch.Tensor
    label: int | tuple[int, ...]
    key: str
    error: str | None
    counted: bool


class EvaluationViews(Dataset):
    """Cuts the views of each sample of a set, as `views_of` does.

    Args:
        shards: The samples.
        config: The clip; its crop and flip are not used.
        temporal: Time windows, or shifts within segments.
        spatial: Crops.
        decoder: Who decodes.
        decode_limit_s: Seconds that a decode may take; None or 0 decodes without limit or protection.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: ClipConfig,
        temporal: int = 1,
        spatial: int = 1,
        decoder: DecoderName = "auto",
        decode_limit_s: float | None = DECODE_LIMIT_S,
    ) -> None:
        """Keeps the arguments; opens nothing."""
        self.shards = shards
        self.config = config
        self.temporal = temporal
        self.spatial = spatial
        self.decoder = decoder
        self.decode_limit_s = decode_limit_s

    def __getitem__(self, item: tuple[int, bool]) -> Views:
        """Returns the views of sample number `item[0]`; `item[1]` tells whether it counts."""
        number, counted = item
        key, label = self.shards.key(number), self.shards.label(number)
        label = -1 if label is None else label
        try:
            sample = self.shards.read(number)
            reader = open_video_apart(sample.video, self.decoder, self.decode_limit_s)
            clips = _cut_views(reader, sample.frame_rate, self.config, self.temporal, self.spatial)
            return Views(number, clips, label, key, None, counted)
        except BadSample as error:
            shape = (self.temporal * self.spatial, self.config.frames, self.config.size, self.config.size, 3)
            return Views(number, torch.zeros(shape, dtype=torch.uint8), label, key, str(error), counted)


def views_of(
    sample: Sample, config: ClipConfig, temporal: int = 1, spatial: int = 1, decoder: DecoderName = "auto"
) -> torch.Tensor:
    """Cuts the views of a sample, decoded once in this process: `temporal` time windows times `spatial` crops.

    Args:
        sample: The sample.
        config: The clip; its crop and flip are not used.
        temporal: Time windows spread evenly over the sample, or its segments' frames; one is the middle.
        spatial: Square crops spread evenly along the longer side; one is the centre.
        decoder: Who decodes.

    Returns:
        `(temporal * spatial, T, H, W, 3)` uint8.

    Raises:
        BadSample: The video cannot be decoded.
    """
    return _cut_views(open_video(sample.video, decoder), sample.frame_rate, config, temporal, spatial)


def _cut_views(reader: VideoReader, frame_rate: float, config: ClipConfig, temporal: int, spatial: int) -> torch.Tensor:
    time_windows = np.stack(view_frames(config, len(reader), frame_rate, temporal))
    needed, places = np.unique(time_windows, return_inverse=True)
    crops = crops_of(torch.from_numpy(reader.read(needed)), config.size, spatial)
    views = torch.empty(temporal, spatial, config.frames, config.size, config.size, 3, dtype=torch.uint8)
    for of_window, shown in zip(views, torch.from_numpy(places.reshape(time_windows.shape)), strict=True):
        for view, crop in zip(of_window, crops, strict=True):
            torch.index_select(crop, 0, shown, out=view)
    return views.flatten(0, 1)


def crops_of(frames: torch.Tensor, size: int, spatial: int) -> list[torch.Tensor]:
    """Returns square crops of frames, spread evenly along the longer side; one is the centre.

    Several are cut out of frames that were resized once, to a short side of `size`, as VideoMAE tests.

    Args:
        frames: `(T, H, W, 3)` uint8.
        size: Height and width of a crop in pixels.
        spatial: Number of crops.
    """
    height, width = frames.shape[1:3]
    if spatial == 1:
        return [cut(frames, view_box(height, width, 0, 1), size)]
    short = min(height, width)
    shape = (round(size * height / short), round(size * width / short))
    resized = cut(frames, (0, 0, height, width), shape)
    boxes = (view_box(*shape, view, spatial) for view in range(spatial))
    return [resized[:, top : top + size, left : left + size] for top, left, _, _ in boxes]


def evaluation_batches(
    views: Dataset[Cut], numbers: np.ndarray, counted: np.ndarray, samples_per_batch: int, workers: int
) -> Iterable[list[Cut]]:
    """Returns an iterable of lists of what `views` gives of samples, each sample once, in the order of `numbers`."""
    items = list(zip(numbers.tolist(), counted.tolist(), strict=True))
    batches = [items[start : start + samples_per_batch] for start in range(0, len(items), samples_per_batch)]
    return load_batches(views, batches, workers, list, pin_memory=False)
