"""Views of a sample: decoded once; crops along the longer side of frames resized once, as VideoMAE tests."""

import itertools

import pytest
import torch
from torchvision.transforms.v2.functional import resize

from pretrain.data.clips import ClipConfig, view_frames
from pretrain.data.shards import ShardSet
from pretrain.data.video import open_video
from pretrain.data.views import crops_of, views_of


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("spatial", [2, 3, 5])
def test_crops_spread_evenly_along_the_longer_side_of_frames_resized_to_the_clips_size(upright, spatial):
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (2, 64, 86, 3), dtype=torch.uint8)
    resized = resize(frames.permute(0, 3, 1, 2), [48, 64], antialias=True).permute(0, 2, 3, 1)  # 86 * 48 / 64 = 64.5
    if upright:
        frames, resized = frames.transpose(1, 2), resized.transpose(1, 2)
    crops = crops_of(frames, 48, spatial)
    assert len(crops) == spatial
    for number, crop in enumerate(crops):
        first = round(16 * number / (spatial - 1))
        expected = resized.narrow(1 if upright else 2, first, 48)
        assert (crop.int() - expected.int()).abs().max() <= 1


def test_one_crop_is_the_centre_of_the_frame():
    frames = torch.arange(80, dtype=torch.uint8).repeat(1, 48, 1).unsqueeze(-1).expand(1, 48, 80, 3)
    (crop,) = crops_of(frames, 48, 1)
    assert crop[0, 0, :, 0].tolist() == list(range(16, 64))


@pytest.mark.parametrize(
    "clip",
    [
        ClipConfig(frames=4, stride=2, size=32),
        ClipConfig(frames=4, stride=8, size=48),
        ClipConfig(frames=4, sampling="segments", size=32),
    ],
    ids=["overlapping", "padded", "segments"],
)
@pytest.mark.parametrize(("temporal", "spatial"), [(1, 1), (3, 1), (2, 3)])
def test_views_decoded_together_are_those_decoded_one_by_one(packed_shards, clip, temporal, spatial):
    shards = ShardSet.open(packed_shards)
    for sample in map(shards.read, range(3)):
        views = views_of(sample, clip, temporal, spatial)
        windows = view_frames(clip, sample.frames, sample.frame_rate, temporal)
        assert len(views) == temporal * spatial
        for view, (window, crop) in zip(views, itertools.product(windows, range(spatial)), strict=True):
            frames = torch.from_numpy(open_video(sample.video).read(window))
            assert torch.equal(view, crops_of(frames, clip.size, spatial)[crop])
