"""Augmentation of clips: alike in all frames, a function of the key alone, and the very operations of the libraries."""

import dataclasses
import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing

from pretrain.data.augmentation import AugmentConfig, augmented, drawing_from, erased, rand_augmented, recoloured
from pretrain.data.clips import ClipConfig
from pretrain.data.config import DataConfig
from pretrain.data.randomness import key_for, torch_seed
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import Request, TrainingClips
from pretrain.errors import Refused

WORDS = "rand-m7-n4-mstd0.5-inc1"
EVERYTHING = AugmentConfig(WORDS, colour_jitter=0.8, grey=0.2, erasing=0.25)
MEAN, STD = ClipConfig().mean, ClipConfig().std


def picture(side: int = 48) -> torch.Tensor:
    drawn = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))[None]
    smooth = torch.nn.functional.interpolate(drawn, (side, side), mode="bilinear")[0]
    return (smooth * 255).to(torch.uint8).permute(1, 2, 0).contiguous()


def still(frames: int = 4, side: int = 48) -> torch.Tensor:
    """A clip whose frames are all the same."""
    return picture(side).expand(frames, -1, -1, -1).contiguous()


def generators() -> tuple:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(WORDS),
        AugmentConfig("rand-m9-n3-tweights-mstd101"),
        AugmentConfig("rand-t3a"),
        AugmentConfig(colour_jitter=1.0, grey=0.3),
        AugmentConfig(erasing=1.0, erasing_mode="const", erasing_count=3),
        dataclasses.replace(EVERYTHING, erasing_mode="const"),
    ],
    ids=str,
)
def test_the_frames_of_a_still_clip_stay_alike_and_bytes(config):
    changed = 0
    for number in range(25):
        clip = augmented(config, still(), key_for(number), MEAN, STD)
        assert (clip.dtype, clip.shape, clip.is_contiguous()) == (torch.uint8, (4, 48, 48, 3), True)
        assert torch.equal(clip, clip[:1].expand_as(clip))
        changed += not torch.equal(clip, still())
    assert changed > 15


@pytest.mark.parametrize("mode", ["pixel", "rand"])
def test_erased_boxes_are_the_same_in_all_frames_and_their_noise_is_not(mode):
    clip = still()
    found = augmented(AugmentConfig(erasing=1.0, erasing_mode=mode), clip, key_for(3), MEAN, STD)
    differs = (found != clip).any(3)
    box = differs.any(0)
    rows, columns = (torch.nonzero(box.any(dimension)).flatten() for dimension in (1, 0))
    assert 0.01 < box.float().mean() < 0.4
    inside = found[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert box.sum() == inside[0, ..., 0].numel()
    assert not torch.equal(inside[0], inside[1])
    assert (mode == "rand") == bool((inside == inside[:, :1, :1]).all())


def test_the_same_key_gives_the_same_clip_whatever_was_drawn_before_and_other_keys_give_others():
    first = augmented(EVERYTHING, still(), 7, MEAN, STD)
    random.random(), np.random.random(3), torch.rand(5)
    others = [augmented(EVERYTHING, still(), key_for(number), MEAN, STD) for number in range(8)]
    assert torch.equal(augmented(EVERYTHING, still(), 7, MEAN, STD), first)
    assert len({clip.numpy().tobytes() for clip in others}) > 6


def test_the_global_generators_are_left_as_they_were():
    before = generators()
    for number in range(10):
        augmented(dataclasses.replace(EVERYTHING, erasing=1.0, colour_jitter=1.0), still(), number, MEAN, STD)
    assert generators() == before
    with pytest.raises(ZeroDivisionError), drawing_from(5):
        random.choice([0]) / 0
    assert generators() == before


def test_a_frame_is_what_timms_rand_augment_makes_of_it():
    settings = {"translate_const": int(48 * 0.45), "interpolation": Image.Resampling.BICUBIC}
    transform = rand_augment_transform(WORDS, settings)
    for key in map(key_for, range(20)):
        found = rand_augmented(WORDS, still(1), key)[0]
        random.seed(torch_seed(key))
        np.random.seed(torch_seed(key) % 2**32)
        assert np.array_equal(found.numpy(), np.asarray(transform(Image.fromarray(picture().numpy()))))


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_a_frame_is_what_timms_random_erasing_makes_of_the_normalised_one_up_to_the_rounding_to_bytes(mode):
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    normalised = (picture().permute(2, 0, 1) / 255 - mean) / std
    config = AugmentConfig(erasing=1.0, erasing_mode=mode, erasing_count=2)
    for key in map(key_for, range(5)):
        found = (erased(config, still(1), key, MEAN, STD)[0].permute(2, 0, 1) / 255 - mean) / std
        with drawing_from(key):
            expected = RandomErasing(1.0, mode=mode, max_count=2, device="cpu")(normalised.clone())
        least, greatest = -mean / std, (1 - mean) / std
        assert torch.allclose(found, expected.clamp(least, greatest), atol=0.51 / 255 / min(STD))


def test_clips_are_erased_and_recoloured_as_often_as_asked():
    config = AugmentConfig(colour_jitter=0.8, grey=0.2, erasing=0.25)
    keys = [key_for(number) for number in range(200)]
    clip = still(1, 16)
    erasures = sum(not torch.equal(erased(config, clip, key, MEAN, STD), clip) for key in keys)
    colours = [recoloured(config, clip, key) for key in keys]
    greys = sum(torch.equal(one[..., 0], one[..., 2]) for one in colours)
    assert abs(erasures - 50) < 25
    assert abs(greys - 40) < 25
    assert abs(sum(torch.equal(one, clip) for one in colours) - 32) < 20


def test_clips_are_augmented_alike_by_any_worker_in_any_order_with_a_draw_of_its_own_for_each_repeat(packed_shards):
    shards = ShardSet.open(packed_shards)
    clip = ClipConfig(frames=4, stride=1, size=32, crop="center")
    plain = DataConfig(clip=clip, repeats=2)
    clips = TrainingClips(shards, dataclasses.replace(plain, augment=EVERYTHING), seed=3)
    requests = [Request(number, 0, number) for number in range(4)]
    ours = [clips[request].clips for request in requests]
    workers = pickle.loads(pickle.dumps(clips))  # as a worker process gets them
    theirs = [workers[request].clips for request in reversed(requests)]
    for one, other in zip(ours, reversed(theirs), strict=True):
        assert all(map(torch.equal, one, other))
        assert not torch.equal(*one)
    unchanged = TrainingClips(shards, plain, seed=3)
    assert all(torch.equal(*unchanged[request].clips) for request in requests)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            ({"rand_augment": words}, r"data\.augment\.rand_augment: .* is not RandAugment in timm's words; give some")
            for words in ("", "rand-mfour", "augmix-m3", "rand-m7-n0", "rand-m7-n12-tweights", "rand-q3", "v0", "rand-")
        ),
        *(({name: 1.5}, rf"data\.augment\.{name}: 1.5 must lie") for name in ("colour_jitter", "grey", "erasing")),
        ({"erasing": math.nan}, r"data\.augment\.erasing: nan"),
        ({"colour_strength": 0.0}, r"data\.augment\.colour_strength: 0.0"),
        ({"erasing_count": 0}, r"data\.augment\.erasing_count: 0 must"),
        ({"erasing_count": 2}, r"data\.augment\.erasing_count: belongs to data\.augment\.erasing, which is 0"),
        ({"colour_strength": 0.8, "grey": 0.1}, r"data\.augment\.colour_strength: belongs to data"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(fields, message):
    with pytest.raises(Refused, match=message):
        DataConfig(augment=AugmentConfig(**fields)).validate()
    for words in (WORDS, "rand", "rand-m9-mstd0.5", "rand-p0.3-n2-mmax15", "rand-t3a-inc1"):
        DataConfig(augment=AugmentConfig(words)).validate()
