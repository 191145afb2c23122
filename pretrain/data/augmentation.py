"""What training changes in a clip after it was cut: RandAugment, colours and random erasing. Pure functions of a key.

A clip is augmented as one picture: every operation has the same strength and place in all of its frames. The libraries'
own operations are used. They draw from global generators, which are seeded from the key before and are as they were
afterwards. A clip stays uint8 all the way; published recipes erase after normalisation, so what they would fill in is
drawn there and brought back to pixels, where what lies outside of 0 to 255 is cut off.
"""

import contextlib
import dataclasses
import functools
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from pretrain.data.randomness import key_for, torch_seed, uniform
from pretrain.errors import Refused

RAND_AUGMENT = re.compile(r"rand(-(m\d+|n[1-9]|p(0|1|0?\.\d+|1\.0+)|mstd\d+(\.\d+)?|mmax\d+|inc[01]|tweights|t3a))*")
TRANSLATION = 0.45
"""Share of a clip's side by which RandAugment's strongest translation moves it, as in VideoMAE and timm."""
HUE_SHARE = 0.25
"""Change of hue for a change of 1 in brightness, contrast and saturation (MoCo v2, arXiv 2003.04297)."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training clips, alike for all frames of a clip; held-out clips have none."""

    rand_augment: str | None = None
    """RandAugment (arXiv 1909.13719) in timm's words, such as rand-m7-n4-mstd0.5-inc1; None is none."""
    colour_jitter: float = 0.0
    """Probability that brightness, contrast, saturation and hue of a clip are changed."""
    colour_strength: float = 0.4
    """Greatest change of brightness, contrast and saturation, as a share; of hue a quarter of it."""
    grey: float = 0.0
    """Probability that a clip loses its colours."""
    erasing: float = 0.0
    """Probability that boxes of a clip, the same in all frames, are erased (random erasing, arXiv 1708.04896)."""
    erasing_mode: Literal["pixel", "rand", "const"] = "pixel"
    """What erased boxes hold: noise, a random colour for each frame, or the mean colour."""
    erasing_count: int = 1
    """Most boxes that are erased; their number is drawn, and together they are as large as one."""

    @property
    def changes(self) -> bool:
        """Whether any clip is changed."""
        return self.rand_augment is not None or max(self.colour_jitter, self.grey, self.erasing) > 0

    def validate(self) -> None:
        """Raises `Refused` for values that cannot be."""
        if self.rand_augment is not None and not RAND_AUGMENT.fullmatch(self.rand_augment):
            raise Refused(
                f"data.augment.rand_augment: {self.rand_augment!r} is not RandAugment in timm's words; give some like "
                f"rand-m7-n4-mstd0.5-inc1 (m magnitude, n operations of 9 at most, mstd its deviation, inc1 rising)"
            )
        for name in ("colour_jitter", "grey", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise Refused(f"data.augment.{name}: {getattr(self, name)} must lie between 0 and 1")
        if not 0 < self.colour_strength <= 1:
            raise Refused(f"data.augment.colour_strength: {self.colour_strength} must be greater than 0 and at most 1")
        if self.erasing_count < 1:
            raise Refused(f"data.augment.erasing_count: {self.erasing_count} must be at least 1")
        usual = AugmentConfig()
        for name, needed in (
            ("colour_strength", "colour_jitter"),
            ("erasing_mode", "erasing"),
            ("erasing_count", "erasing"),
        ):
            if getattr(self, name) != getattr(usual, name) and not getattr(self, needed):
                raise Refused(f"data.augment.{name}: belongs to data.augment.{needed}, which is 0; give that too")


def augmented(
    config: AugmentConfig, clip: torch.Tensor, key: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Augments a clip: first its colours, then RandAugment, then erasing.

    Args:
        config: What is done.
        clip: `(T, H, W, 3)` uint8.
        key: Key of the purpose `augment` of this clip; its parts draw from keys of their own.
        mean: Mean of each colour channel, for values in [0, 1], by which the model normalises.
        std: Standard deviation, likewise.

    Returns:
        `(T, H, W, 3)` uint8; the clip itself where nothing was drawn to be done.
    """
    if not config.changes:
        return clip
    clip = recoloured(config, clip, key_for(key, "colour"))
    if config.rand_augment is not None:
        clip = rand_augmented(config.rand_augment, clip, key_for(key, "rand_augment"))
    return erased(config, clip, key_for(key, "erasing"), mean, std)


def recoloured(config: AugmentConfig, clip: torch.Tensor, key: int) -> torch.Tensor:
    """Changes or takes away the colours of some clips, by torchvision; arguments as for `augmented`."""
    jitters, greys = uniform(key, 2) < (config.colour_jitter, config.grey)
    if not (jitters or greys):
        return clip
    from torchvision.transforms.v2 import ColorJitter  # takes seconds
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    pictures = clip.permute(0, 3, 1, 2)
    if jitters:
        strength = config.colour_strength
        with drawing_from(key):
            pictures = ColorJitter(strength, strength, strength, strength * HUE_SHARE)(pictures)
    if greys:
        pictures = rgb_to_grayscale(pictures, num_output_channels=3)
    return pictures.permute(0, 2, 3, 1).contiguous()


def rand_augmented(words: str, clip: torch.Tensor, key: int) -> torch.Tensor:
    """Applies timm's RandAugment to all frames with the same draws; `words` are `AugmentConfig.rand_augment`."""
    transform = rand_augment(words, min(clip.shape[1:3]))
    frames = []
    for frame in clip.numpy():
        with drawing_from(key):
            frames.append(np.asarray(transform(Image.fromarray(frame))))
    return torch.from_numpy(np.stack(frames))


@functools.cache
def rand_augment(words: str, side: int) -> Callable[[Image.Image], Image.Image]:
    """Returns timm's RandAugment with VideoMAE's settings: translations by the clip's side, bicubic, grey borders."""
    from timm.data.auto_augment import rand_augment_transform  # takes seconds

    settings: dict[str, Any] = {"translate_const": int(side * TRANSLATION), "interpolation": Image.Resampling.BICUBIC}
    return rand_augment_transform(words, settings)


def erased(
    config: AugmentConfig, clip: torch.Tensor, key: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Erases boxes of some clips, by timm's RandomErasing; arguments as for `augmented`.

    A box is the same in all frames, and noise and random colours are drawn for each frame, as in VideoMAE: so timm is
    given all frames as channels of one picture.
    """
    if uniform(key)[0] >= config.erasing:
        return clip
    from timm.data.random_erasing import RandomErasing  # takes seconds

    T, H, W, C = clip.shape
    erase = RandomErasing(1.0, mode=config.erasing_mode, max_count=config.erasing_count, device="cpu")
    with drawing_from(key):
        filling = erase(torch.full((T * C, H, W), torch.nan))
    box = ~filling[0].isnan()
    normalised = filling.view(T, C, H, W).permute(0, 2, 3, 1)[:, box]  # (T, pixels of the box, C)
    pixels = (normalised * torch.tensor(std) + torch.tensor(mean)) * 255
    clip = clip.clone()
    clip[:, box] = pixels.round().clamp(0, 255).to(torch.uint8)
    return clip


@contextlib.contextmanager
def drawing_from(key: int) -> Iterator[None]:
    """Seeds the global generators of Python, numpy and torch from a key, and leaves them as they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    seed = torch_seed(key)
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
