"""Pictures of clips, and of what a masked autoencoder makes of them: arrays in, a filmstrip out; no model, no page.

Reconstructions leak nothing. A masked autoencoder with normalised targets (He et al., 2022) predicts a tubelet's
pattern but not its brightness and contrast; the field's usual pictures take those two from the hidden pixels
themselves, and so look better than the model is. `paint` takes them from the visible tubelets around. A model with
plain targets predicts the pixels themselves.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from pretrain.model.mae import TargetName

RECONSTRUCTION_NOTE = (
    "Top: the clip. Middle: all that the encoder sees. Bottom: visible tubelets as they are, masked ones as the model "
    "predicts them; their brightness and contrast, which the model does not predict, are interpolated from the visible "
    "tubelets around, never read from hidden pixels."
)
PLAIN_RECONSTRUCTION_NOTE = (
    "Top: the clip. Middle: all that the encoder sees. Bottom: visible tubelets as they are, masked ones as the model "
    "predicts them, brightness and contrast included."
)
UNDECODED_NOTE = "Grey in the bottom row: what training never asks the model for."
FRAMES_SHOWN = 16
SHEET_FRAMES = 8
SHEET_COLUMNS = 4
FRAME_SIDE_PX = 128
SHEET_COLOR = (128, 128, 128)
HIDDEN = (128, 128, 128, 56)  # a tint that lets the page shine through


def paint(
    clip: np.ndarray,
    visible: np.ndarray,
    masked: np.ndarray,
    prediction: np.ndarray,
    tubelet: tuple[int, int, int],
    targets: TargetName = "normalised",
) -> np.ndarray:
    """Paints a model's prediction over a clip's masked tubelets, from visible pixels and the prediction alone.

    Token n is at (slot, row, column) with n = (slot * Ht + row) * Wt + column.

    Args:
        clip: uint8 (T, H, W, C); its hidden pixels are never read.
        visible: Numbers of the tokens that the encoder saw, (Nv,).
        masked: Numbers of the tokens that were predicted, (Nm,).
        prediction: (Nm, t * h * w * C) in the layout (t, h, w, C): normalised values, or pixels in [0, 1].
        tubelet: The size (t, h, w) of a tubelet.
        targets: What is predicted, as `DecoderConfig.targets`.

    Returns:
        uint8 (T, H, W, C): visible tubelets unchanged, masked ones predicted, any others grey.
    """
    visible, masked = np.asarray(visible, dtype=int), np.asarray(masked, dtype=int)
    grid = _grid(clip.shape, tubelet)
    tubelets = _cut(clip, tubelet)
    if targets == "pixels":
        mean, deviation = np.zeros((len(masked), 1)), np.full((len(masked), 1), 255.0)
    else:
        seen = tubelets[visible].astype(np.float64)  # (Nv, t * h * w, C)
        seen = seen.reshape(len(seen), -1, 1) if targets == "normalised_whole" else seen
        mean, deviation = _interpolated_statistics(seen, visible, masked, grid)
    pattern = np.nan_to_num(np.asarray(prediction, dtype=np.float64), posinf=1e6, neginf=-1e6).reshape(
        len(masked), *tubelets.shape[1:]
    )
    painted = np.full_like(tubelets, 128)
    painted[visible] = tubelets[visible]
    painted[masked] = np.clip(np.rint(pattern * deviation[:, None] + mean[:, None]), 0, 255)
    return _join(painted, grid, tubelet)


def visible_pixels(visible: np.ndarray, clip_shape: Sequence[int], tubelet: tuple[int, int, int]) -> np.ndarray:
    """Returns which pixels belong to visible tokens: bool (T, H, W) for a clip of shape (T, H, W, ...)."""
    grid = _grid(clip_shape, tubelet)
    tubelets = np.zeros((np.prod(grid), np.prod(tubelet), 1), dtype=bool)
    tubelets[np.asarray(visible, dtype=int)] = True
    return _join(tubelets, grid, tubelet)[..., 0]


def filmstrip(original: np.ndarray, visible_mask: np.ndarray, reconstruction: np.ndarray) -> Image.Image:
    """Draws three rows of frames: the clip, what the encoder sees of it, and the reconstruction.

    Of a clip with more than `FRAMES_SHOWN` frames, evenly spaced ones are shown; small frames are enlarged by a whole
    factor without smoothing.

    Args:
        original: uint8 (T, H, W, 3).
        visible_mask: bool (T, H, W), from `visible_pixels`.
        reconstruction: uint8 (T, H, W, 3), from `paint`.
    """
    chosen = _evenly(len(original), FRAMES_SHOWN)
    masked = np.where(visible_mask[chosen, ..., None], _with_alpha(original[chosen]), np.array(HIDDEN, dtype=np.uint8))
    rows = (_with_alpha(original[chosen]), masked, _with_alpha(reconstruction[chosen]))
    frames = [[_at_shown_size(Image.fromarray(frame)) for frame in row] for row in rows]
    width, height = frames[0][0].size
    between_frames, between_rows = 4, 12
    strip = Image.new(
        "RGBA", (len(chosen) * (width + between_frames) - between_frames, 3 * (height + between_rows) - between_rows)
    )
    for row_number, row in enumerate(frames):
        for frame_number, frame in enumerate(row):
            strip.paste(frame, (frame_number * (width + between_frames), row_number * (height + between_rows)))
    return strip


def frame_sheet(clip: np.ndarray) -> Image.Image:
    """Draws evenly spaced frames of a clip in rows of four.

    Args:
        clip: uint8 (T, H, W, 3).
    """
    frames = [_at_shown_size(Image.fromarray(clip[number])) for number in _evenly(len(clip), SHEET_FRAMES)]
    width, height = frames[0].size
    columns, gap = min(len(frames), SHEET_COLUMNS), 4
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), SHEET_COLOR)
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % columns * (width + gap), number // columns * (height + gap)))
    return sheet


def _evenly(frames: int, shown: int) -> np.ndarray:
    """Returns the numbers of evenly spaced frames, first and last among them."""
    return np.unique(np.linspace(0, frames - 1, min(shown, frames)).round().astype(int))


def _with_alpha(frames: np.ndarray) -> np.ndarray:
    return np.concatenate([frames, np.full((*frames.shape[:-1], 1), 255, dtype=np.uint8)], axis=-1)


def _at_shown_size(frame: Image.Image) -> Image.Image:
    scale = FRAME_SIDE_PX / min(frame.size)
    if scale >= 1:
        return frame.resize([round(scale) * side for side in frame.size], Image.Resampling.NEAREST)
    return frame.resize([round(scale * side) for side in frame.size], Image.Resampling.LANCZOS)


def _grid(shape: Sequence[int], tubelet: tuple[int, int, int]) -> tuple[int, int, int]:
    if any(size % part for size, part in zip(shape, tubelet, strict=False)):
        raise ValueError(f"tubelets of {tubelet} do not tile a clip of {tuple(shape[:3])}")
    return shape[0] // tubelet[0], shape[1] // tubelet[1], shape[2] // tubelet[2]


def _cut(clip: np.ndarray, tubelet: tuple[int, int, int]) -> np.ndarray:
    """(T, H, W, C) -> (N, t * h * w, C)."""
    (slots, rows, columns), (t, h, w) = _grid(clip.shape, tubelet), tubelet
    blocks = clip.reshape(slots, t, rows, h, columns, w, -1).transpose(0, 2, 4, 1, 3, 5, 6)
    return blocks.reshape(slots * rows * columns, t * h * w, clip.shape[-1])


def _join(tubelets: np.ndarray, grid: tuple[int, int, int], tubelet: tuple[int, int, int]) -> np.ndarray:
    """(N, t * h * w, C) -> (T, H, W, C)."""
    (slots, rows, columns), (t, h, w) = grid, tubelet
    blocks = tubelets.reshape(slots, rows, columns, t, h, w, -1).transpose(0, 3, 1, 4, 2, 5, 6)
    return blocks.reshape(slots * t, rows * h, columns * w, -1)


def _interpolated_statistics(
    seen: np.ndarray, visible: np.ndarray, masked: np.ndarray, grid: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and deviation (Nm, C) at masked tokens, from visible ones weighted by distance to the power -4."""
    if len(visible) == 0:
        unknown = np.ones((len(masked), seen.shape[-1]))
        return 128 * unknown, 48 * unknown
    places = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid), axis=-1)
    squared = ((places[masked][:, None] - places[visible][None]) ** 2).sum(axis=-1)  # (Nm, Nv), at least 1
    weights = 1.0 / squared.astype(np.float64) ** 2
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ seen.mean(axis=1), weights @ seen.std(axis=1)
