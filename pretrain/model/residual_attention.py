"""Residual attention on feature maps (Wang et al., 2017, arXiv 1704.06904), and a tubelet stem made of it.

A trunk branch computes features F, a soft mask branch looks at the same input on a coarser scale and weighs them with
M; the output (1 + M) * F strengthens what matters and never loses the original. The stem runs this inside each tubelet
by itself, so hidden tubelets stay hidden and only visible ones are computed: a convolution over the whole clip would
carry masked pixels into visible tokens.

Two choices differ from the paper's image classifier. Norms are group norms of one group, with the statistics of one
sample's map: those of batch norm would depend on which tubelets are visible, and on the size of a rank's batch.
Convolutions and pooling are 1 x 3 x 3, within a frame: a tubelet is two frames deep as a rule, so that a kernel over
three frames would cost three times as much to see mostly padding. Frames of a tubelet meet in the stem's first
convolution and in its projection.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.model.tubelets import TubeletEmbedding, cut_tubelets

AttentionKind = Literal["mixed", "channel", "spatial"]

STEM_CHANNELS = 32
STEM_POOLINGS = 2
# The stem's first convolution halves a tubelet's sides, and so does each pooling; less than one pixel is none.
SMALLEST_STEM_SIDE = 2 ** (STEM_POOLINGS + 1)


class ResidualUnit(nn.Module):
    """The pre-activation bottleneck (He et al., 2016, arXiv 1603.05027): 1 x 1, 1 x 3 x 3 and 1 x 1 convolutions.

    Args:
        channels: Channels of the feature map; a quarter of them in the middle.
    """

    def __init__(self, channels: int) -> None:
        """Creates three convolutions, each behind a norm and a ReLU."""
        super().__init__()
        middle = channels // 4
        self.branch = nn.Sequential(
            *_activated_convolution(channels, middle),
            *_activated_convolution(middle, middle, (1, 3, 3)),
            *_activated_convolution(middle, channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """`(B, D, T, H, W)` to `(B, D, T, H, W)`."""
        return features + self.branch(features)


class SoftMask(nn.Module):
    """The soft mask branch: bottom-up by max pooling, top-down by interpolation, with a skip connection at each scale.

    Args:
        channels: Channels of the feature map.
        poolings: Number of times that height and width are halved.
        units: Residual units behind each pooling and before each interpolation, r in the paper.
        kind: How the last convolution's output becomes attention (the paper's equations 4 to 6).
    """

    def __init__(self, channels: int, poolings: int, units: int, kind: AttentionKind) -> None:
        """Creates the units of every scale and the two last convolutions."""
        super().__init__()
        self.down = nn.ModuleList(_units(units, channels) for _ in range(poolings))
        self.skips = nn.ModuleList(ResidualUnit(channels) for _ in range(poolings - 1))
        self.up = nn.ModuleList(_units(units, channels) for _ in range(poolings))
        self.head = nn.Sequential(
            *_activated_convolution(channels, channels), *_activated_convolution(channels, channels)
        )
        self.activation = ACTIVATIONS[kind]

    def forward(self, features: Tensor) -> Tensor:
        """Returns the mask M, `(B, D, T, H, W)`, of a feature map `(B, D, T, H, W)`."""
        sizes, skipped = [], []
        for level, units in enumerate(self.down):
            if level > 0:
                skipped.append(self.skips[level - 1](features))
            sizes.append(features.shape[-3:])
            features = units(functional.max_pool3d(features, (1, 3, 3), (1, 2, 2), (0, 1, 1)))
        for units in reversed(self.up):
            features = functional.interpolate(units(features), sizes.pop(), mode="trilinear", align_corners=False)
            if skipped:
                features = features + skipped.pop()
        return self.activation(self.head(features))


class ResidualAttention(nn.Module):
    """The attention module: H = (1 + M) * F (equation 3).

    Args:
        channels: Channels of the feature map, D; a multiple of 4.
        poolings: Number of times that the mask branch halves height and width.
        before: Residual units before the branches part, p in the paper.
        trunk: Residual units of the trunk branch, t in the paper.
        mask: Residual units behind each pooling and before each interpolation of the mask branch, r in the paper.
        kind: "mixed" weighs each channel at each position by a sigmoid, "channel" scales the channels of a position to
            length 1, "spatial" normalises each channel over its positions before the sigmoid.
    """

    def __init__(
        self,
        channels: int,
        poolings: int = STEM_POOLINGS,
        before: int = 1,
        trunk: int = 2,
        mask: int = 1,
        kind: AttentionKind = "mixed",
    ) -> None:
        """Creates both branches."""
        super().__init__()
        self.before = _units(before, channels)
        self.trunk = _units(trunk, channels)
        self.mask = SoftMask(channels, poolings, mask, kind)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, D, T, H, W)` to `(B, D, T, H, W)`."""
        features = self.before(features)
        return (1 + self.mask(features)) * self.trunk(features)

    def attention(self, features: Tensor) -> Tensor:
        """Returns the mask M, `(B, D, T, H, W)`, that `forward` uses for a feature map `(B, D, T, H, W)`."""
        return self.mask(self.before(features))


class ConvolutionalTubeletEmbedding(TubeletEmbedding):
    """Embeds each tubelet by a small convolutional network with residual attention.

    A convolution that halves height and width, residual attention, and a linear projection of the whole map: a token
    depends on the pixels of its own tubelet and on nothing else. At 2 x 16 x 16 and width 768 this takes less than four
    times the multiply-adds of the linear projection, about a twentieth of those of ViT-B's blocks.

    Args:
        tubelet: Frames, height and width of a tubelet; height and width of at least `SMALLEST_STEM_SIDE`.
        width: Width of a token, D.
        mean: Mean of each colour channel, for values in [0, 1].
        std: Standard deviation of each colour channel.
        channels: Channels of the feature map, a multiple of 4.
    """

    def __init__(
        self,
        tubelet: tuple[int, int, int],
        width: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        channels: int = STEM_CHANNELS,
    ) -> None:
        """Creates the network; the projection is Xavier-initialised as in MAE."""
        t, h, w = tubelet
        super().__init__(tubelet, width, mean, std, features=channels * t * math.ceil(h / 2) * math.ceil(w / 2))
        depth = 1 if t == 1 else 3
        self.convolution = nn.Conv3d(len(mean), channels, (depth, 3, 3), (1, 2, 2), (depth // 2, 1, 1))
        self.attention = ResidualAttention(channels)
        self.norm = nn.GroupNorm(1, channels)

    def embed(self, tubelets: Tensor) -> Tensor:
        """Embeds tubelets `(..., P)`, uint8 or normalised floats, as tokens `(..., D)`."""
        features = self.attention(self._features(tubelets))
        tokens = self.projection(functional.relu(self.norm(features)).flatten(1))
        return tokens.unflatten(0, tubelets.shape[:-1])

    def attention_mask(self, clips: Tensor) -> Tensor:
        """Returns the attention masks of clips for pictures.

        Args:
            clips: `(B, T, H, W, C)` as for `forward`.

        Returns:
            `(B, T, H, W)`: the mean of M over the channels, interpolated to pixels within each tubelet, in [0, 1].
        """
        tubelets = cut_tubelets(clips, self.tubelet)
        mask = self.attention.attention(self._features(tubelets)).mean(1, keepdim=True)
        mask = functional.interpolate(mask, self.tubelet, mode="trilinear", align_corners=False)
        B, T, H, W, _ = clips.shape
        t, h, w = self.tubelet
        return mask.view(B, T // t, H // h, W // w, t, h, w).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, T, H, W)

    def _features(self, tubelets: Tensor) -> Tensor:
        """Returns the first feature map of each tubelet: `(..., P)` to `(K, channels, t, h / 2, w / 2)`."""
        pixels = self._normalised(tubelets).reshape(-1, *self.tubelet, len(self.mean))
        return self.convolution(pixels.permute(0, 4, 1, 2, 3))


def _activated_convolution(inputs: int, outputs: int, kernel: tuple[int, int, int] = (1, 1, 1)) -> list[nn.Module]:
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return [nn.GroupNorm(1, inputs), nn.ReLU(), nn.Conv3d(inputs, outputs, kernel, padding=padding)]


def _units(count: int, channels: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualUnit(channels) for _ in range(count)))


def _scale_channels(scores: Tensor) -> Tensor:
    return functional.normalize(scores, dim=1)


def _spatial_sigmoid(scores: Tensor) -> Tensor:
    return torch.sigmoid(functional.instance_norm(scores))


ACTIVATIONS: dict[AttentionKind, Callable[[Tensor], Tensor]] = {
    "mixed": torch.sigmoid,
    "channel": _scale_channels,
    "spatial": _spatial_sigmoid,
}
