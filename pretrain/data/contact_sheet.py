"""A picture of a shard set: the middle frame of samples drawn evenly over its classes, in a grid with their names.

Samples are drawn by keys (`randomness.py`), so one seed gives one picture. Frames are decoded in a worker process: a
video that crashes its decoder leaves its place in the grid grey, and the others whole.
"""

import colorsys
import dataclasses
import functools
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pretrain.data.decode_check import ended_by_stall
from pretrain.data.pool import WorkerPool
from pretrain.data.randomness import key_for, permutation
from pretrain.data.remote import RemoteFolder
from pretrain.data.shards import ShardSet
from pretrain.data.video import open_video
from pretrain.errors import TubeletError

MAX_SAMPLES = 1000
CELL_WIDTH_PX = 288
GAP_PX = 20
MARGIN_PX = 44
CAPTION_PX = 40
HEADING_PX = 92
CORNER_PX = 8
SMOOTHED_BELOW = 3
"""Enlargement from which pixels are shown as squares."""
PAGE = (251, 250, 247)
INK = (38, 38, 43)
FAINT = (142, 141, 148)
EMPTY = (228, 226, 221)
KEY_HASH = re.compile("-[0-9a-f]{16}$")
"""The end of the keys that packing makes."""
STALL_S = 30
"""How long decoding one frame may take, in seconds."""


@dataclasses.dataclass(frozen=True)
class FrameTask:
    """A sample whose middle frame is wanted, by its number in the set."""

    folder: Path | RemoteFolder
    number: int


def contact_sheet(shards: ShardSet, samples: int, seed: int) -> Image.Image:
    """Draws the contact sheet of a set.

    Args:
        shards: The set.
        samples: How many samples to show, at most.
        seed: Chooses them.
    """
    by_class = shards.labelled and not shards.multi_label
    labels = shards.labels() if by_class else [0] * shards.samples
    numbers = draw_evenly(labels, samples, seed)
    with WorkerPool(middle_frame, 1) as pool:
        frames = [
            frame if isinstance(frame, np.ndarray) else None
            for frame in pool.map(FrameTask(shards.folder, number) for number in numbers)
        ]
    ratios = [frame.shape[0] / frame.shape[1] for frame in frames if frame is not None]
    cell_height = round(CELL_WIDTH_PX * min(max(statistics.median(ratios or [0.75]), 0.5), 1.5))
    columns = _columns(len(numbers), cell_height)
    rows = math.ceil(len(numbers) / columns)
    width = 2 * MARGIN_PX + columns * (CELL_WIDTH_PX + GAP_PX) - GAP_PX
    height = 2 * MARGIN_PX + HEADING_PX + rows * (cell_height + CAPTION_PX + GAP_PX) - GAP_PX
    sheet = Image.new("RGB", (width, height), PAGE)
    _write_heading(sheet, shards, len(numbers))
    for place, (number, frame) in enumerate(zip(numbers, frames, strict=True)):
        row, column = divmod(place, columns)
        left = MARGIN_PX + column * (CELL_WIDTH_PX + GAP_PX)
        top = MARGIN_PX + HEADING_PX + row * (cell_height + CAPTION_PX + GAP_PX)
        cell, mask = _cell(frame, cell_height)
        sheet.paste(cell, (left, top), mask)
        label = labels[number] if by_class else None
        name = KEY_HASH.sub("", shards.key(number)) if label is None else shards.classes[label]
        _write_caption(sheet, (left, top + cell_height), name, number, _hue(label))
    return sheet


def draw_evenly(labels: Sequence[int], count: int, seed: int) -> list[int]:
    """Draws samples so that no class has two more than another that has more to give.

    Args:
        labels: The class of each sample.
        count: How many samples to draw, at most.
        seed: Chooses them, and the classes where there are more classes than `count`.

    Returns:
        The numbers of the samples, by class and then ascending.
    """
    by_class: dict[int, list[int]] = {}
    for number in permutation(key_for(seed, "contact sheet"), len(labels)).tolist():
        by_class.setdefault(labels[number], []).append(number)
    order = permutation(key_for(seed, "contact sheet classes"), max(by_class) + 1)
    classes = [by_class[label] for label in order.tolist() if label in by_class]
    turns = range(max(map(len, classes)))
    drawn = [one[turn] for turn in turns for one in classes if turn < len(one)][:count]
    return sorted(drawn, key=lambda number: (labels[number], number))


def middle_frame(task: FrameTask) -> np.ndarray | None:
    """Returns the middle frame of a sample, `(H, W, 3)` uint8, or None if it cannot be read or decoded."""
    try:
        sample = _opened(task.folder).read(task.number)
        with ended_by_stall(STALL_S):
            reader = open_video(sample.video)
            return reader.read(np.array([len(reader) // 2]))[0]
    except TubeletError:
        return None


def shortened(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """Returns a text cut in its middle so that it fits into `room` pixels: keys differ at their ends."""
    if font.getlength(text) <= room:
        return text
    for kept in range(len(text) - 1, 1, -1):
        short = f"{text[: (kept + 1) // 2]}\u2026{text[-(kept // 2) :]}"
        if font.getlength(short) <= room:
            return short
    return "\u2026"


@functools.cache
def font(size_px: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Returns DejaVu Sans, which has Latin, Greek, Cyrillic and more, as matplotlib brings it along."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / name), size_px)


@functools.lru_cache(maxsize=1)
def _opened(folder: Path | RemoteFolder) -> ShardSet:
    return ShardSet.open(folder)


def _columns(count: int, cell_height: int) -> int:
    """As many columns as make the sheet about 3 wide to 2 high, or one more if that fills the last row better."""
    aspect = (cell_height + CAPTION_PX + GAP_PX) / (CELL_WIDTH_PX + GAP_PX)
    wanted = min(max(round(math.sqrt(1.5 * count * aspect)), 1), count)
    return min((wanted, min(wanted + 1, count)), key=lambda columns: -count % columns)


def _cell(frame: np.ndarray | None, height: int) -> tuple[Image.Image, Image.Image]:
    """Returns the picture of a cell, a frame on an empty ground, and a mask that rounds its corners."""
    cell = Image.new("RGB", (CELL_WIDTH_PX, height), EMPTY)
    if frame is None:
        place = CELL_WIDTH_PX / 2, height / 2
        ImageDraw.Draw(cell).text(place, "cannot be decoded", FAINT, font(17), anchor="mm")
    else:
        picture = _fitted(Image.fromarray(frame), CELL_WIDTH_PX, height)
        cell.paste(picture, ((CELL_WIDTH_PX - picture.width) // 2, (height - picture.height) // 2))
    mask = Image.new("L", (4 * CELL_WIDTH_PX, 4 * height), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), 4 * CORNER_PX, fill=255)
    return cell, mask.resize(cell.size, Image.Resampling.LANCZOS)


def _fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(width / picture.width, height / picture.height)
    size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
    smooth = Image.Resampling.LANCZOS if scale < SMOOTHED_BELOW else Image.Resampling.NEAREST
    return picture.resize(size, smooth)


def _write_heading(sheet: Image.Image, shards: ShardSet, shown: int) -> None:
    draw = ImageDraw.Draw(sheet)
    room = sheet.width - 2 * MARGIN_PX
    title, small = font(32, bold=True), font(18)
    classes = f"{len(shards.classes)} classes" if shards.labelled else "unlabelled"
    facts = (f"{shown} of {shards.samples} samples", classes, f"fingerprint {shards.fingerprint[:12]}")
    line = " \u00b7 ".join(facts)
    name = Path(str(shards.folder)).absolute().name
    draw.text((MARGIN_PX, MARGIN_PX), shortened(name, title, room), INK, title, anchor="lt")
    draw.text((MARGIN_PX, MARGIN_PX + 46), shortened(line, small, room), FAINT, small, anchor="lt")


def _write_caption(
    sheet: Image.Image, corner: tuple[int, int], name: str, number: int, colour: tuple[int, int, int] | None
) -> None:
    draw = ImageDraw.Draw(sheet)
    left, middle = corner[0] + 2, corner[1] + 22
    right: float = corner[0] + CELL_WIDTH_PX - 2
    draw.text((right, middle), f"#{number}", FAINT, font(14), anchor="rm")
    right -= draw.textlength(f"#{number}", font(14)) + 10
    if colour is not None:
        draw.ellipse((left, middle - 5, left + 10, middle + 5), colour)
        left += 18
    draw.text((left, middle), shortened(name, font(18), right - left), INK, font(18), anchor="lm")


def _hue(label: int | None) -> tuple[int, int, int] | None:
    """A colour for each class, far from those of the classes around it."""
    if label is None:
        return None
    red, green, blue = colorsys.hls_to_rgb(label * 0.618034 % 1, 0.52, 0.62)
    return round(255 * red), round(255 * green), round(255 * blue)
