"""Self-contained HTML pages.

Three kinds of part (`Figure`, `Table`, `Section`) make a page, and pretraining, evaluation and the demo compose their
`report.html` from them, with what `drawings.py` draws and the filmstrips of `pictures.py`. A page is one file: it opens
without a network or a script, follows the reader's light or dark theme, and is the same for the same input. How it
looks is in `report.html.jinja`.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from pretrain.drawings import confusion_matrix, curves, intervals, reliability_diagram
from pretrain.files import write_text
from pretrain.pictures import RECONSTRUCTION_NOTE, filmstrip, paint, visible_pixels

__all__ = [
    "RECONSTRUCTION_NOTE",
    "Figure",
    "Section",
    "Table",
    "confusion_matrix",
    "curves",
    "filmstrip",
    "intervals",
    "paint",
    "reliability_diagram",
    "visible_pixels",
    "write_report",
]

WIDE_PX = 640


@dataclass(frozen=True)
class Figure:
    """A picture on a page: inline SVG from `drawings.py`, a PIL image, or the path of a picture file."""

    content: str | Image.Image | Path
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """A table on a page; cells are text or numbers.

    Rows beyond those `shown` are folded away. One that is not `wide` stands beside a small drawing. One of mere `text`
    has no numbers to align, and long words such as paths are broken.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    shown: int | None = None
    wide: bool = True
    text: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and figures and tables in their order."""

    title: str
    text: str = ""
    parts: Sequence[Figure | Table] = ()


def write_report(
    path: Path,
    title: str,
    summary: str = "",
    headline: Sequence[tuple[str, str]] = (),
    sections: Sequence[Section] = (),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes a self-contained HTML page, atomically.

    Args:
        path: The file, such as `runs/b/report.html`.
        title: The page's heading.
        summary: One or two sentences below it.
        headline: The few figures that count, as (figure, what it is) pairs, such as ("86 %", "pretrained").
        sections: The body.
        facts: What the run was (config, versions, times), listed at the end.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"picture": _picture, "cell": _cell}
    environment.tests |= {"table": lambda part: isinstance(part, Table), "wide": _is_wide, "number": _is_number}
    page = environment.get_template("report.html.jinja").render(
        title=title, summary=summary, headline=headline, sections=sections, facts=facts or {}
    )
    write_text(path, page)


def _picture(figure: Figure) -> Markup:
    """Returns the HTML of a figure's picture, which needs no other file."""
    if isinstance(figure.content, str):
        return Markup(figure.content)
    if isinstance(figure.content, Path):
        kind = figure.content.suffix.lower().lstrip(".").replace("jpg", "jpeg").replace("svg", "svg+xml")
        content = figure.content.read_bytes()
    else:
        file = io.BytesIO()
        lossless = figure.content.mode != "RGB"  # frames of videos are; drawn pictures have clear parts
        figure.content.save(file, format="webp", lossless=lossless, quality=85)
        kind, content = "webp", file.getvalue()
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Markup('<img src="{}" alt="{}">').format(source, figure.caption)


def _is_wide(part: Figure | Table) -> bool:
    """Returns whether a part needs the whole width of the page; small drawings and pictures stand side by side."""
    if isinstance(part, Table):
        return part.wide
    if isinstance(part.content, Image.Image):
        return part.content.width > WIDE_PX
    drawing = part.content if isinstance(part.content, str) else ""
    width = re.search(r"max-width: (\d+)px", drawing)
    return width is None or int(width[1]) > WIDE_PX


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.4g}"


def _is_number(value: Any) -> bool:
    return re.match(r"[-+\u2212]?\d", _cell(value)) is not None
