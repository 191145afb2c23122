"""From a sample's frames to a clip: which frames, which crop, which size. Pure functions of a key; uint8 all the way.

The multi-scale crop is VideoMAE's (arXiv 2203.12602, appendix; itself from Temporal Segment Networks, arXiv
1608.00859), and so is sampling by segments; the random resized crop is torchvision's.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from pretrain.data.randomness import raw_words, torch_seed, uniform
from pretrain.errors import Refused

Box = tuple[int, int, int, int]  # top, left, height, width in pixels

MULTI_SCALES = (1.0, 0.875, 0.75, 0.66)
# The 13 offsets of a crop, in quarters of the free room: (row, column).
MULTI_SCALE_OFFSETS = (
    *((row, column) for row in (0, 2, 4) for column in (0, 2, 4)),
    *((row, column) for row in (1, 3) for column in (1, 3)),
)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """How a clip is cut from a sample."""

    frames: int = 16
    """Frames that the model sees."""
    sampling: Literal["time_window", "segments"] = "time_window"
    """Frames evenly spaced in a stretch of time, by frame_rate or stride; or one from each of as many equal segments of
    the whole video (Temporal Segment Networks, Something-Something), which needs neither."""
    frame_rate: float | None = None
    """Frames per second that the model sees (7.5 is the literature's stride 4 at 30 fps); this or stride."""
    stride: int | None = None
    """Distance of the clip's frames in stored frames; this or frame_rate."""
    size: int = 224
    """Height and width of a clip in pixels."""
    crop: Literal["multi_scale", "random_resized", "center"] = "multi_scale"
    """How training crops: VideoMAE's multi-scale crop, torchvision's random resized crop, or the centre."""
    scale: tuple[float, float] = (0.5, 1.0)
    """Least and greatest share of the area that a random resized crop keeps."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Least and greatest aspect ratio of a random resized crop."""
    flip: bool = False
    """Mirror half of the training clips; wrong where left and right carry the label (Something-Something)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each colour channel, for values in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of each colour channel, for values in [0, 1]."""

    def validate(self) -> None:
        """Raises `Refused` for a clip that cannot be cut."""
        if self.sampling == "segments":
            if self.frame_rate is not None or self.stride is not None:
                raise Refused(
                    "data.clip.sampling: segments spread over the whole video, whatever its length; set "
                    "data.clip.frame_rate and data.clip.stride to null, or data.clip.sampling to time_window"
                )
        elif (self.frame_rate is None) == (self.stride is None):
            raise Refused("data.clip: give exactly one of frame_rate and stride, or sampling segments")
        if self.frames < 1 or self.size < 1:
            raise Refused("data.clip.frames and data.clip.size must be at least 1")
        if not all(0 < rate < math.inf for rate in (self.frame_rate, self.stride) if rate is not None):
            raise Refused("data.clip.frame_rate and data.clip.stride must be finite and greater than 0")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise Refused("data.clip.scale must be two numbers, 0 < least <= greatest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise Refused("data.clip.ratio must be two finite numbers, 0 < least <= greatest")
        if not all(map(math.isfinite, self.mean)):
            raise Refused("data.clip.mean must be three finite numbers")
        if not all(0 < deviation < math.inf for deviation in self.std):
            raise Refused("data.clip.std must be three finite numbers greater than 0")

    def step(self, stored_rate: float) -> float:
        """Returns the distance of the clip's frames in stored frames, of which there are `stored_rate` in a second."""
        step = self.stride if self.frame_rate is None else stored_rate / self.frame_rate
        assert step is not None, "a valid configuration gives one of the two"
        return step

    def frames_of(self, frames: int, stored_rate: float) -> int:
        """Returns how many frames a sample of `frames` stored ones has for clips: the most that are not padded."""
        return math.ceil((frames - 0.5) / self.step(stored_rate))


def training_frames(config: ClipConfig, frames: int, stored_rate: float, key: int) -> tuple[np.ndarray, bool]:
    """Draws the stored frames of a training clip: where its time window lies, or a frame of each segment.

    Args:
        config: The clip.
        frames: Frames in the sample, at least 1.
        stored_rate: Stored frames per second.
        key: Key of the purpose `time` of this clip.

    Returns:
        As `frame_indices`.
    """
    if config.sampling == "segments":
        return segment_frames(config, frames, uniform(key, config.frames))
    return frame_indices(config, frames, stored_rate, uniform(key)[0])


def view_frames(config: ClipConfig, frames: int, stored_rate: float, views: int) -> list[np.ndarray]:
    """Returns the stored frames of each of `views` temporal views of a sample; arguments as for `frame_indices`.

    Time windows spread evenly, from the earliest to the latest. With segments the first view has the first frame of
    each segment, and each one after it frames that are later by the same share of a segment, as VideoMAE's two views
    of Something-Something have. A single view is the middle, of the video or of each segment.
    """
    if config.sampling == "segments":
        shares = [0.5] if views == 1 else [view / views for view in range(views)]
        return [segment_frames(config, frames, np.full(config.frames, share))[0] for share in shares]
    moments = [0.5] if views == 1 else np.linspace(0, 1, views).tolist()
    return [frame_indices(config, frames, stored_rate, moment)[0] for moment in moments]


def segment_frames(config: ClipConfig, frames: int, shares: np.ndarray) -> tuple[np.ndarray, bool]:
    """Chooses one stored frame in each of `config.frames` equal segments of a sample.

    Args:
        config: The clip.
        frames: Frames in the sample, at least 1.
        shares: `(config.frames,)` where in its segment each frame lies, in [0, 1).

    Returns:
        `(config.frames,)` ascending frame numbers, and whether the sample was too short, in which case frames are
        repeated.
    """
    moments = np.arange(config.frames) + shares
    return np.floor(moments * (frames / config.frames)).astype(np.int64).clip(max=frames - 1), frames < config.frames


def frame_indices(config: ClipConfig, frames: int, stored_rate: float, moment: float) -> tuple[np.ndarray, bool]:
    """Chooses the stored frames of a clip that shows a time window.

    Args:
        config: The clip; it gives a frame rate or a stride.
        frames: Frames in the sample, at least 1.
        stored_rate: Stored frames per second.
        moment: Where the time window lies, from 0 (earliest) to 1 (latest).

    Returns:
        `(config.frames,)` ascending frame numbers, and whether the sample was too short, in which case its last frame
        is repeated.
    """
    step = config.step(stored_rate)
    span = (config.frames - 1) * step
    room = frames - 1 - span
    first = min(int(moment * (int(room) + 1)), int(room)) if room > 0 else 0
    indices = np.floor(first + np.arange(config.frames) * step + 0.5).astype(np.int64)
    padded = bool(indices[-1] > frames - 1)
    return np.minimum(indices, frames - 1), padded


def training_box(config: ClipConfig, height: int, width: int, key: int) -> Box:
    """Draws the crop of a training clip: top, left, height and width in pixels of the stored frame."""
    if config.crop == "multi_scale":
        return _multi_scale_box(config.size, height, width, key)
    if config.crop == "random_resized":
        return _random_resized_box(config, height, width, key)
    return view_box(height, width, 0, 1)


def view_box(height: int, width: int, view: int, views: int) -> Box:
    """Returns the `view`-th of `views` square crops spread along the longer side; one view is the centre."""
    side = min(height, width)
    share = 0.5 if views == 1 else view / (views - 1)
    return round((height - side) * share), round((width - side) * share), side, side


def cut(frames: torch.Tensor, box: Box, size: int | tuple[int, int], mirror: bool = False) -> torch.Tensor:
    """Crops, resizes (bilinear, antialiased) and mirrors frames.

    Args:
        frames: `(T, H, W, 3)` uint8.
        box: The crop.
        size: Height and width of the result in pixels, one number where they are the same.
        mirror: Exchange left and right.

    Returns:
        `(T, size, size, 3)` uint8, contiguous, in memory of its own.
    """
    top, left, height, width = box
    shape = (size, size) if isinstance(size, int) else size
    frames = frames[:, top : top + height, left : left + width]
    if (height, width) == shape and not mirror:
        return frames.clone(memory_format=torch.contiguous_format)
    frames = frames.permute(0, 3, 1, 2)
    if (height, width) != shape:
        frames = functional.interpolate(frames, shape, mode="bilinear", antialias=True)
    if mirror:
        frames = frames.flip(-1)
    return frames.permute(0, 2, 3, 1).contiguous()


def is_mirrored(config: ClipConfig, key: int) -> bool:
    """Draws whether a training clip is mirrored."""
    return config.flip and uniform(key)[0] < 0.5


def _multi_scale_box(size: int, height: int, width: int, key: int) -> Box:
    longest = min(height, width)
    sides = [min(_snapped(max(int(longest * scale), 1), size), longest) for scale in MULTI_SCALES]
    # Aspect ratios are distorted by one scale at most.
    pairs = [(rows, columns) for i, rows in enumerate(sides) for j, columns in enumerate(sides) if abs(i - j) <= 1]
    words = raw_words(key, 2)
    rows, columns = pairs[int(words[0] % np.uint64(len(pairs)))]
    down, right = MULTI_SCALE_OFFSETS[int(words[1] % np.uint64(len(MULTI_SCALE_OFFSETS)))]
    return (height - rows) // 4 * down, (width - columns) // 4 * right, rows, columns


def _snapped(side: int, size: int) -> int:
    """A crop within two pixels of the clip's size takes that size, which spares the resampling."""
    return size if abs(side - size) < 3 else side


def _random_resized_box(config: ClipConfig, height: int, width: int, key: int) -> Box:
    from torchvision.transforms.v2 import RandomResizedCrop  # takes seconds, of which other crops need none

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(key))
        crop = RandomResizedCrop(config.size, scale=config.scale, ratio=config.ratio, antialias=True)
        drawn = crop.make_params([torch.empty(1, height, width)])
    return drawn["top"], drawn["left"], drawn["height"], drawn["width"]
