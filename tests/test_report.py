"""Report pages: whole, self-contained, escaped, the same for the same input."""

import re
import warnings
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pretrain.report import (
    Figure,
    Section,
    Table,
    confusion_matrix,
    curves,
    intervals,
    reliability_diagram,
    write_report,
)

VOID = {"meta", "img", "br", "link"}
HOSTILE = '<script>alert("x")</script> & "$y$"'


class Page(HTMLParser):
    """Reads a page, failing on tags that do not match; collects text, and all addresses that a browser would load."""

    def __init__(self, page: str):
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, content):
        self.text += content


def write_sample(path, picture):
    write_report(
        path,
        f"Report {HOSTILE}",
        summary="What it is.",
        headline=[("86 %", "pretrained"), ("+31 points", "gained")],
        sections=[
            Section(
                "Curves",
                "Over time.",
                [
                    Figure(
                        curves({HOSTILE: ([1, 2, 3], [3, None, 1]), "b": ([1, 2], [1, 2])}, HOSTILE, "step", "loss")
                    ),
                    Figure(Image.new("RGBA", (8, 8)), f"A caption {HOSTILE}"),
                    Figure(picture, "from a file"),
                ],
            ),
            Section("Errors", parts=[Figure(confusion_matrix(np.eye(3, dtype=int), ["a", HOSTILE, "c"]))]),
            Section(
                "Seeds", parts=[Table(["seed", "top-1"], [["0", 86.25], ["1", 0.5], [HOSTILE, "-3"]], "Accuracy.")]
            ),
            Section("Empty", parts=[Table(["a"], [])]),
        ],
        facts={"config": HOSTILE, "steps": 500},
    )


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "strip.png"
    Image.new("RGB", (4, 4), (255, 0, 0)).save(path)
    return path


def test_a_page_is_whole_and_loads_nothing_from_anywhere(tmp_path, picture):
    write_sample(tmp_path / "report.html", picture)
    content = (tmp_path / "report.html").read_text()
    page = Page(content)
    assert page.addresses
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert "@import" not in content
    assert re.findall(r"url\((?!#)", content) == []
    assert {"data:image/webp", "data:image/png"} <= {address.split(";")[0] for address in page.addresses}
    for text in ("86 %", "gained", "Over time.", "86.2", "from a file", "500", "Accuracy."):
        assert text in page.text


def test_names_from_users_are_text_on_the_page_and_never_markup_or_formulas(tmp_path, picture):
    write_sample(tmp_path / "report.html", picture)
    page = Page((tmp_path / "report.html").read_text())
    assert "script" not in page.tags
    assert page.text.count('alert("x")') >= 6
    assert '"$y$"' in page.text


def test_the_same_report_is_the_same_file_byte_for_byte(tmp_path, picture):
    write_sample(tmp_path / "one.html", picture)
    write_sample(tmp_path / "two.html", picture)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.html", "strip.png", "two.html"]


def test_a_page_that_cannot_be_made_leaves_the_old_one_in_place(tmp_path, picture):
    report = tmp_path / "report.html"
    write_sample(report, picture)
    before = report.read_bytes()
    with pytest.raises(FileNotFoundError):
        write_sample(report, tmp_path / "missing.png")
    assert report.read_bytes() == before


def polylines(drawing: str) -> list[str]:
    """Returns the style of each line of data."""
    return re.findall(r'style="fill: none; stroke: (var\(--series-\d\))', drawing)


def test_curves_draw_each_series_in_a_color_of_the_theme_with_its_name():
    drawing = curves({"pretrained": (range(50), range(50)), "scratch": (range(50), range(50))}, "Top-1", "epoch", "%")
    assert ElementTree.fromstring(drawing.replace("xlink:", "")).tag == "svg"
    assert {"var(--series-1)", "var(--series-2)"} == set(polylines(drawing))
    assert all(name in drawing for name in ("pretrained", "scratch", "Top-1", "epoch"))
    assert re.findall("#0101|#0102", drawing) == []


def test_several_seeds_are_one_line_in_a_band():
    one = curves({"a": ([1, 2, 3], [1, 2, 3])}, "t", "x", "y")
    three = curves({"a": ([1, 2, 3], [[1, 2, 3], [2, 3, 4], [0, 1, 2]])}, "t", "x", "y")
    assert "fill-opacity" not in one
    assert "fill-opacity" in three
    assert polylines(one) == polylines(three)


def test_a_run_of_a_million_steps_stays_a_small_drawing():
    steps = np.arange(1_000_000)
    loss = np.exp(-steps / 2e5) + np.random.default_rng(0).normal(0, 0.1, len(steps))
    assert len(curves({"loss": (steps, loss)}, "Loss", "step", "loss")) < 60_000


@pytest.mark.parametrize(
    "series",
    [
        {},
        {"empty": ([], [])},
        {"only nulls": ([1, 2], [None, float("nan")])},
        {"one point": ([1], [3])},
        {"not positive": ([1, 2], [0, -1])},
        {"_hidden": ([1, 2], [1, 2]), "gap": ([1, 2, 3], [1, None, float("inf")])},
        {f"series {number}": ([1, 2], [1, number]) for number in range(9)},
    ],
)
@pytest.mark.parametrize("log_y", [False, True])
def test_curves_of_any_metrics_are_drawn_without_a_warning(series, log_y):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing = curves(series, "t", "x", "y", log_y)
    assert len(series) < 2 or all(name in drawing for name in series)


@pytest.mark.parametrize(
    ("count", "named", "counted"), [(1, True, True), (2, True, True), (30, True, False), (400, False, False)]
)
def test_a_confusion_matrix_is_readable_for_few_and_for_many_classes(count, named, counted):
    names = [f"class {number}" for number in range(count)]
    counts = 7777 * np.eye(count, dtype=int)
    counts[-1] = 0  # a class with no samples
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing = confusion_matrix(counts, names)
    assert (f">{names[0]}<" in drawing) == named
    assert (">7777<" in drawing) == (counted and count > 1)
    assert len(drawing) < 60_000
    assert int(re.search(r"max-width: (\d+)px", drawing)[1]) <= 900


def test_a_confusion_matrix_takes_long_and_foreign_names():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing = confusion_matrix(np.eye(3), ["x" * 80, "泳ぐ", "_walk"])
    assert "x" * 21 + "…" in drawing
    assert "泳ぐ" in drawing
    assert "x" * 30 not in drawing


@pytest.mark.parametrize("bins", [0, 1, 15])
def test_a_reliability_diagram_has_a_point_for_each_bin(bins):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing = reliability_diagram(np.linspace(0.1, 0.9, bins), np.linspace(0.2, 1, bins), range(1, bins + 1))
    assert drawing.count("opacity: 0.85") >= bins
    assert "var(--series-1)" in drawing or bins == 0


def test_intervals_name_each_value_and_mark_zero_where_it_lies_among_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        differences = intervals(["a", HOSTILE, "x" * 80], [1, -2, 3], [[-1, 2], [-3, -1], [2, 5]], "points")
        shares = intervals(["a"], [50], [[40, 60]], "%")
    assert ">a<" in differences
    assert "x" * 21 + "…" in differences
    assert "<script>" not in differences
    assert "stroke-dasharray" in differences
    assert "stroke-dasharray" not in shares


def test_rows_past_those_shown_are_folded_away_without_a_script(tmp_path):
    rows = [(f"class {number}", number) for number in range(9)]
    write_report(tmp_path / "report.html", "t", sections=[Section("s", parts=[Table(("class", "n"), rows, shown=4)])])
    content = (tmp_path / "report.html").read_text()
    open_part, folded = content.split("<details>")
    assert "class 3" in open_part
    assert "class 4" not in open_part
    assert "<summary>5 more</summary>" in folded
    assert "class 8" in folded
    assert Page(content).tags.count("tr") == 10
