"""Drawings for pages, as inline SVG that follows the reader's light or dark theme: arrays in, text out; no files."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator

POINTS_DRAWN = 600
CLASSES_NAMED = 55
CLASSES_NAMED_LARGE = 30
CLASSES_COUNTED = 14

# Matplotlib draws in these marker colours; on the page they become CSS variables and follow the theme.
INK, MUTED, GRID = "#010101", "#010102", "#010103"
SERIES = tuple(f"#01020{number}" for number in range(1, 7))
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(SERIES, start=1)
}
MATRIX_COLOR = (74, 120, 232)


def curves(
    series: Mapping[str, tuple[Sequence[float], Any]], title: str, x_label: str, y_label: str, log_y: bool = False
) -> str:
    """Draws lines as inline SVG.

    Args:
        series: For each name the x values (points,) and the y values: (points,), or (runs, points) for several seeds,
            drawn as their mean in a band from the lowest to the highest. None and nan leave a gap, and so does what a
            logarithm does not have. Long series are drawn as the means of `POINTS_DRAWN` equal stretches.
        title: Stands above the axes.
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
        log_y: Whether the y axis is logarithmic.
    """
    with rc_context(_STYLE):
        canvas = Canvas(figsize=(5.4, 3.4), layout="constrained")
        canvas.suptitle(title, x=0.01, ha="left")
        axes = canvas.add_subplot(xlabel=x_label, ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        lines = []
        for number, (x_values, y_values) in enumerate(series.values()):
            x, runs = _thinned(np.asarray(x_values, dtype=float), np.atleast_2d(np.asarray(y_values, dtype=float)))
            runs = np.where(runs > 0, runs, np.nan) if log_y else runs
            color, dashes = SERIES[number % len(SERIES)], ("-", "--", ":")[number // len(SERIES) % 3]
            marker = "o" if len(x) < 25 else ""
            lines += axes.plot(x, _mean(runs), dashes, color=color, marker=marker, markersize=3.5, linewidth=1.8)
            if len(runs) > 1:
                axes.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=color, alpha=0.2, linewidth=0)
        if log_y:
            axes.set_yscale("log", subs=[])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        if len(lines) > 1:
            axes.legend(lines, [f"\u200b{name}" for name in series], frameon=False)  # else matplotlib drops "_name"
        return _svg(canvas, title)


def confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Draws a confusion matrix as inline SVG, each true class's row shaded by its shares.

    Args:
        counts: (K, K) numbers of samples; rows are true classes, columns predicted ones.
        classes: K names; shown up to `CLASSES_NAMED` classes, and the counts up to `CLASSES_COUNTED`.
    """
    counts = np.asarray(counts).astype(int)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side_in = float(np.clip(0.42 * len(classes), 2.2, 7.2))
    pixels = np.empty((*share.shape, 4), dtype=np.uint8)
    pixels[...] = (*MATRIX_COLOR, 0)
    exponent = (
        0.7 if len(classes) <= CLASSES_NAMED else 0.5
    )  # below 1, so that rare confusions show, in small cells too
    pixels[..., 3] = np.rint(255 * share**exponent)
    with rc_context(_STYLE):
        canvas = Canvas(figsize=(side_in + 1.6, side_in + 1.3), layout="constrained")
        axes = canvas.add_subplot(xlabel="predicted", ylabel="true")
        axes.imshow(pixels, interpolation="none")
        axes.spines[:].set_visible(True)
        axes.set(xticks=[], yticks=[])
        if len(classes) <= CLASSES_NAMED:
            names = [_short(name) for name in map(str, classes)]
            slanted: Any = (
                {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
            )
            size = _STYLE["font.size"] if len(names) <= CLASSES_NAMED_LARGE else 7.2
            axes.set_xticks(range(len(names)), names, fontsize=size, **slanted)
            axes.set_yticks(range(len(names)), names, fontsize=size)
        if len(classes) <= CLASSES_COUNTED:
            for row, column in zip(*np.nonzero(counts), strict=True):
                color = "#ffffff" if share[row, column] > 0.45 else INK
                axes.text(column, row, f"{counts[row, column]:d}", color=color, ha="center", va="center")
        return _svg(canvas, f"Confusion matrix of {len(classes)} classes")


def reliability_diagram(probabilities: Sequence[float], accuracies: Sequence[float], videos: Sequence[int]) -> str:
    """Draws how often a model is right against how sure it is, as inline SVG.

    Args:
        probabilities: The mean probability of the predicted class in each bin.
        accuracies: The share of each bin in which it is right.
        videos: How many videos each bin holds; a point's area follows it.
    """
    with rc_context(_STYLE):
        canvas = Canvas(figsize=(4.4, 4.2), layout="constrained")
        canvas.suptitle("Calibration", x=0.01, ha="left")
        axes = canvas.add_subplot(xlabel="probability of the predicted class, %", ylabel="right, %")
        axes.set(xlim=(-3, 103), ylim=(-3, 103), aspect="equal", xticks=range(0, 101, 20), yticks=range(0, 101, 20))
        axes.plot([0, 100], [0, 100], "--", color=MUTED, linewidth=1)
        x, y = 100 * np.asarray(probabilities), 100 * np.asarray(accuracies)
        axes.plot(x, y, color=SERIES[0], linewidth=1.2, alpha=0.6)
        share = np.asarray(videos) / max(sum(videos), 1)
        axes.scatter(x, y, s=12 + 380 * share, color=SERIES[0], linewidth=0, alpha=0.85, zorder=3, clip_on=False)
        axes.grid(color=GRID, linewidth=0.8)
        return _svg(canvas, "Reliability diagram")


def intervals(names: Sequence[str], values: Sequence[float], bounds: Sequence[Sequence[float]], x_label: str) -> str:
    """Draws values with their intervals, one below the other, as inline SVG.

    Args:
        names: What each value belongs to.
        values: The values.
        bounds: Lower and upper bound of each.
        x_label: What they are, with their unit.
    """
    with rc_context(_STYLE):
        canvas = Canvas(figsize=(5.4, 0.9 + 0.36 * len(names)), layout="constrained")
        axes = canvas.add_subplot(xlabel=x_label)
        places = np.arange(len(names))
        low, high = np.asarray(bounds, dtype=float).T
        axes.hlines(places, low, high, color=SERIES[0], linewidth=2, alpha=0.6)
        axes.scatter(values, places, s=34, color=SERIES[0], linewidth=0, zorder=3)
        if low.min() < 0:  # differences, whose zero counts
            axes.axvline(0, color=MUTED, linewidth=1, linestyle="--")
        axes.set_yticks(places, [_short(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        return _svg(canvas, x_label)


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"


def _thinned(x: np.ndarray, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(points,), (runs, points) -> the same with at most `POINTS_DRAWN` points, each the mean of a stretch."""
    if len(x) <= POINTS_DRAWN:
        return x, runs
    stretches = np.array_split(np.arange(len(x)), POINTS_DRAWN)
    return (
        np.array([x[stretch].mean() for stretch in stretches]),
        np.stack([_mean(runs[:, stretch].T) for stretch in stretches], axis=-1),
    )


def _mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean over the first axis, of what is finite; nan where nothing is."""
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    return np.where(count > 0, np.where(finite, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tubelet",
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": INK,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.size": 3,
    "ytick.minor.visible": False,
}


def _svg(canvas: Canvas, label: str) -> str:
    """Returns a figure as an SVG element for HTML: themed, of flexible size, with no dates and no unused ids."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser has the glyph
        canvas.savefig(file, format="svg", metadata={"Date": None})
    drawing = file.getvalue()
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawing[drawing.index("<svg") :], flags=re.S)
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", drawing))
    drawing = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", drawing)
    for marker, variable in THEME.items():
        drawing = drawing.replace(marker, variable)
    opening, content = drawing.split(">", 1)
    view_box = re.findall(r'viewBox="([^"]*)"', opening)[0]
    width_px = round(96 * canvas.get_figwidth())
    template = Markup('<svg role="img" aria-label="{}" viewBox="{}" style="max-width: {}px">')
    return template.format(label, view_box, width_px) + Markup(content)
