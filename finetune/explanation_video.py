"""The video of an explanation: the clip as the model saw it, and beside it where the model looked, as a heat map.

Colours go from 0 to the greatest share that a tubelet of this clip has, which the bar gives as a multiple of the mean
share of its tubelets; so two videos do not share a scale, and where the greatest is hardly more than the mean the model
looked everywhere alike. All frames of a tubelet have its colour.
"""

import dataclasses
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from av import VideoFrame
from PIL import Image, ImageDraw

from finetune.heat_map import HeatMap
from pretrain.data.contact_sheet import FAINT, INK, PAGE, font, shortened
from pretrain.data.mp4_encoder import Mp4Encoder
from pretrain.errors import printable

COLOURS = "inferno"
OPACITY = 0.6
PANEL_PX = 320
"""Frames are enlarged by a whole factor to at least this."""
MARGIN_PX = 16
HEADING_PX = 72
FOOTING_PX = 44
BAR_PX = 96, 12
SLOWEST = 1.0
"""Frames per second below which players stumble."""


@dataclasses.dataclass(frozen=True)
class Caption:
    """What stands above an explanation.

    Attributes:
        name: The class that the video is taken for.
        probability: Its probability, over all views.
        file: The name of the video.
        view: Which of its views is shown; empty where it has one.
    """

    name: str
    probability: float
    file: str
    view: str


def encode_explanation(found: HeatMap, caption: Caption, rate: float) -> bytes:
    """Returns an explanation as an H.264 mp4.

    Args:
        found: The clip and where the model looked.
        caption: What stands above it.
        rate: Frames per second; no less than `SLOWEST` are shown.
    """
    frames = draw_explanation(found, caption)
    first = next(frames)
    encoder = Mp4Encoder(first.size, Fraction(max(rate, SLOWEST)).limit_denominator(1001), gop=len(found.clip))
    for frame in (first, *frames):
        encoder.write(VideoFrame.from_image(frame))
    return encoder.finish().video


def draw_explanation(found: HeatMap, caption: Caption) -> Iterator[Image.Image]:
    """Yields each frame of an explanation: the clip's on the left, with heat on the right."""
    clip, heat = found
    T, H, W, _ = clip.shape
    factor = math.ceil(PANEL_PX / min(H, W))
    width, height = W * factor, H * factor
    colours = colour_map()
    greatest = heat.max()
    page = Image.new("RGB", _even(3 * MARGIN_PX + 2 * width, HEADING_PX + height + FOOTING_PX), PAGE)
    _write_heading(page, caption)
    _write_footing(page, MARGIN_PX + width, HEADING_PX + height, colours, greatest / heat.mean())
    for number, frame in enumerate(clip):
        plain = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
        shares = heat[number * len(heat) // T] / greatest
        hot = Image.fromarray(colours[(255 * shares).round().astype(int)])
        hot = hot.resize((width, height), Image.Resampling.NEAREST)
        page.paste(plain, (MARGIN_PX, HEADING_PX))
        page.paste(Image.blend(plain.convert("L").convert("RGB"), hot, OPACITY), (2 * MARGIN_PX + width, HEADING_PX))
        drawn = page.copy()
        place = MARGIN_PX, HEADING_PX + height + FOOTING_PX / 2
        ImageDraw.Draw(drawn).text(place, f"frame {number + 1} of {T}, as the model saw it", FAINT, font(14), "lm")
        yield drawn


def colour_map() -> np.ndarray:
    """Returns the colours `(256, 3)` uint8 from no heat to the greatest."""
    import matplotlib

    return matplotlib.colormaps[COLOURS](np.arange(256), bytes=True)[:, :3]


def _write_heading(page: Image.Image, caption: Caption) -> None:
    draw = ImageDraw.Draw(page)
    large, small = font(22, bold=True), font(14)
    share = f"{100 * caption.probability:.1f} %"
    room = page.width - 2 * MARGIN_PX
    name = shortened(printable(caption.name), large, room - large.getlength(share) - 16)
    draw.text((MARGIN_PX, 24), f"{name}  {share}", INK, large, "lm")
    view = small.getlength(caption.view)
    draw.text((page.width - MARGIN_PX, 52), caption.view, FAINT, small, "rm")
    draw.text((MARGIN_PX, 52), shortened(printable(caption.file), small, room - view - 16), FAINT, small, "lm")


def _write_footing(page: Image.Image, left: int, top: int, colours: np.ndarray, times: float) -> None:
    """Draws the bar of colours with its ends, right-aligned."""
    draw, small = ImageDraw.Draw(page), font(14)
    middle = top + FOOTING_PX / 2
    width, height = BAR_PX
    text = f"{times:.1f} \u00d7 mean"
    right = page.width - MARGIN_PX - small.getlength(text)
    draw.text((right, middle), text, INK, small, "lm")
    bar = Image.fromarray(colours[None, :]).resize(BAR_PX)
    page.paste(bar, (round(right - 8 - width), round(middle - height / 2)))
    draw.text((right - 16 - width, middle), "attention 0", INK, small, "rm")


def _even(width: int, height: int) -> tuple[int, int]:
    """Returns a size of even numbers, which H.264's halved colours need."""
    return width + width % 2, height + height % 2
