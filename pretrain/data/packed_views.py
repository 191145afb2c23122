"""The views of evaluation samples for models that read packed clips: each clip whole, at its own size, for itself.

The sibling of `views.py`. A clip has a sequence of its own, which is long enough for any clip, so that no token is
dropped; a view is a time window, and shows the whole frame but for what goes beyond the greatest aspect ratio.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from pretrain.data.clips import cut, view_frames
from pretrain.data.decode_client import DECODE_LIMIT_S, open_video_apart
from pretrain.data.packed_clips import grid_of_sample
from pretrain.data.packed_sequences import ClipTokens, Sequences, fill_sequences, shaped_box, tokens_of
from pretrain.data.randomness import Purpose, sample_key
from pretrain.data.sequence_plan import ClipGrid, Packing
from pretrain.data.shards import ShardSet
from pretrain.data.video import DecoderName, VideoReader, open_video, read_time_windows
from pretrain.data.views import HELD_OUT_SET
from pretrain.errors import BadSample


class PackedViews(NamedTuple):
    """The views of one evaluation sample.

    Attributes:
        sample: The sample number.
        sequences: One for each view; zeros where the sample cannot be decoded.
        label: Its class number, -1 where it has none.
        key: Its key.
        error: Why it cannot be decoded, or None.
        counted: False for a filler that only keeps ranks in step.
    """

    sample: int
    sequences: Sequences
    label: int
    key: str
    error: str | None
    counted: bool


class PackedEvaluationViews(Dataset):
    """Cuts the views of each sample of a set.

    Args:
        shards: The samples.
        packing: How clips are sized and masked; each has a sequence for itself.
        temporal: Time windows spread evenly over a sample; one is the middle.
        decoder: Who decodes.
        decode_limit_s: Seconds that a decode may take; None or 0 decodes without limit or protection.

    Raises:
        Refused: The set's index does not tell the sizes of videos.
    """

    def __init__(
        self,
        shards: ShardSet,
        packing: Packing,
        temporal: int = 1,
        decoder: DecoderName = "auto",
        decode_limit_s: float | None = DECODE_LIMIT_S,
    ) -> None:
        """Keeps the arguments and looks into the first index of the set."""
        self.shards = shards
        self.packing = packing.of_one_clip()
        self.temporal = temporal
        self.decoder = decoder
        self.decode_limit_s = decode_limit_s
        grid_of_sample(shards, 0, packing)

    def __getitem__(self, item: tuple[int, bool]) -> PackedViews:
        """Returns the views of sample number `item[0]`; `item[1]` tells whether it counts."""
        number, counted = item
        shard, row = self.shards.locate(number)
        index = self.shards.shard_index(shard)
        key, label = index.keys[row], -1 if index.labels is None else index.labels[row]
        try:
            grid, clips = self.clips(number)
            tokens = [_tokens_of_view(clip, grid, self.packing, number) for clip in clips]
            return PackedViews(
                number, fill_sequences([[one] for one in tokens], self.packing), label, key, None, counted
            )
        except BadSample as error:
            return PackedViews(number, self._nothing(), label, key, str(error), counted)

    def clips(self, number: int) -> tuple[ClipGrid, list[torch.Tensor]]:
        """Returns the grid of a sample and its views, each `(T, H, W, 3)` uint8; raises `BadSample`."""
        grid = grid_of_sample(self.shards, number, self.packing)
        sample = self.shards.read(number)
        reader = open_video_apart(sample.video, self.decoder, self.decode_limit_s)
        return grid, cut_packed_views(reader, sample.frame_rate, grid, self.packing, self.temporal)

    def tokens(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the numbers of the visible and of the decoded tokens of a sample's views."""
        kept = grid_of_sample(self.shards, number, self.packing).tokens
        return self.packing.masks.draw(kept, _fixed_key(number, "mask"), _fixed_key(number, "decoder_mask"))

    def _nothing(self) -> Sequences:
        t, h, w = self.packing.sizing.tubelet
        nothing = torch.zeros(self.packing.tokens, t * h * w * 3, dtype=torch.uint8)
        where = torch.zeros(self.packing.tokens, 3, dtype=torch.int64)
        decoded = nothing[:1].expand(self.packing.decoded, -1), where[:1].expand(self.packing.decoded, -1)
        return fill_sequences([[ClipTokens(nothing, where, *decoded)]] * self.temporal, self.packing)


def packed_views_of(
    video: bytes, grid: ClipGrid, frame_rate: float, packing: Packing, temporal: int = 1, decoder: DecoderName = "auto"
) -> Sequences:
    """Cuts the views of a video of no set, decoded in this process; `grid` is that of its clips.

    Raises:
        BadSample: The video cannot be decoded.
    """
    alone = packing.of_one_clip()
    clips = cut_packed_views(open_video(video, decoder), frame_rate, grid, alone, temporal)
    return fill_sequences([[_tokens_of_view(clip, grid, alone, sample=0)] for clip in clips], alone)


def cut_packed_views(
    reader: VideoReader, frame_rate: float, grid: ClipGrid, packing: Packing, temporal: int = 1
) -> list[torch.Tensor]:
    """Cuts the views of a video.

    Args:
        reader: The video.
        frame_rate: Its frames per second.
        grid: The grid of its clips.
        packing: How clips are sized.
        temporal: Time windows spread evenly over the video; one is the middle.

    Returns:
        `(T, H, W, 3)` uint8 for each view.

    Raises:
        BadSample: The video cannot be decoded.
    """
    clip = dataclasses.replace(packing.sizing.clip, frames=packing.sizing.frames(grid), crop="center")
    windows = view_frames(clip, len(reader), frame_rate, temporal)
    shape = packing.sizing.pixels(grid)
    shown = [torch.from_numpy(frames) for frames in read_time_windows(reader, windows)]
    return [cut(frames, shaped_box(clip, frames.shape[1:3], shape, key=0), shape) for frames in shown]


def _tokens_of_view(clip: torch.Tensor, grid: ClipGrid, packing: Packing, sample: int) -> ClipTokens:
    keys = [_fixed_key(sample, purpose) for purpose in ("drop", "mask", "decoder_mask")]
    return tokens_of(clip, grid, grid.tokens, packing, *keys)


def _fixed_key(sample: int, purpose: Purpose) -> int:
    return sample_key(0, HELD_OUT_SET, 0, sample, 0, purpose)
