"""From image models to clips (ViViT, arXiv 2103.15691, section 3.4), and from clips to clips of other sizes."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from pretrain.errors import Refused
from pretrain.model.positions import resampled
from pretrain.model.tubelets import Grid, grid_of
from pretrain.model.weights.parts import ConvertedModel
from pretrain.model.weights.source import Weights

InflationName = Literal["central", "average"]


def inflated(
    model: ConvertedModel, frames: int, tubelet: tuple[int, int, int], inflation: InflationName
) -> ConvertedModel:
    """Returns an image model as a model of clips: its positions are repeated in every slot.

    Args:
        model: An image model.
        frames: Frames of a clip.
        tubelet: Frames, height and width of a tubelet; height and width must be those of the image's patches.
        inflation: `central` puts the patch embedding in the tubelet's frame t // 2, with zeros elsewhere (ViViT,
            equation 9); `average` divides it evenly among the frames (equation 8).

    Raises:
        Refused: The patches are of another size, or the frames do not divide.
    """
    t, h, w = tubelet
    _, patch_h, patch_w = model.encoder.tubelet
    if (h, w) != (patch_h, patch_w):
        raise Refused(
            f"tubelet: is {t} x {h} x {w}, but the image model has patches of {patch_h} x {patch_w}; use those"
        )
    if frames < 1 or t < 1 or frames % t:
        raise Refused(f"frames: {frames} frames do not divide into tubelets of {t}; change one of frames and tubelet")
    weights = dict(model.weights)
    weights["embedding.projection.weight"] = inflated_kernel(weights["embedding.projection.weight"], t, inflation)
    weights["positions.table"] = weights["positions.table"].repeat(1, frames // t, 1)
    return dataclasses.replace(
        model, encoder=dataclasses.replace(model.encoder, tubelet=tubelet), frames=frames, weights=weights
    )


def inflated_kernel(projection: Tensor, frames: int, inflation: InflationName) -> Tensor:
    """Returns the projection `(D, h * w * C)` of patches as one of tubelets of `frames` frames, `(D, P)`."""
    if inflation == "average":
        return projection.repeat(1, frames) / frames
    parts = [torch.zeros_like(projection)] * frames
    parts[frames // 2] = projection
    return torch.cat(parts, 1)


def resized(model: ConvertedModel, frames: int, size: tuple[int, int]) -> ConvertedModel:
    """Returns a model for clips of other frames or size; learned positions are interpolated.

    Args:
        model: The model.
        frames: Frames of a clip.
        size: Height and width of a clip in pixels.

    Raises:
        Refused: Frames or size do not divide into tubelets.
    """
    t, h, w = model.encoder.tubelet
    if frames < 1 or frames % t:
        raise Refused(f"frames: {frames} frames do not divide into tubelets of {t}; change frames")
    if min(size) < 1 or size[0] % h or size[1] % w:
        raise Refused(f"size: {size[0]} x {size[1]} pixels do not divide into patches of {h} x {w}; change size")
    weights = with_positions_for(model.weights, model.grid, grid_of(frames, size, model.encoder.tubelet))
    return dataclasses.replace(model, frames=frames, size=size, weights=weights)


def with_positions_for(weights: Weights, old: Grid, new: Grid) -> Weights:
    """Returns an encoder's weights with its learned positions interpolated from one token grid to another."""
    result = dict(weights)
    for prefix, grids in {
        "positions.": (old, new),
        "temporal_positions.": (Grid(old.slots, 1, 1), Grid(new.slots, 1, 1)),
    }.items():
        tables = {name.removeprefix(prefix): table for name, table in weights.items() if name.startswith(prefix)}
        result |= {prefix + name: table for name, table in resampled(tables, *grids).items()}
    return result
