"""What a comparison of runs shows: tables in the terminal, `comparison.json` and a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table as TerminalTable

from finetune.compare import Comparison, set_text
from finetune.evaluation_page import interval_text, percent
from finetune.multi_label import is_multi_label
from finetune.output import make_writable, writing_to
from finetune.paired_figures import Compared, Discordant
from finetune.run_results import Group
from pretrain.files import write_json
from pretrain.report import Figure, Section, Table, intervals, write_report

TITLE = "Figures"
HEADLINES = 4
NOT_DRAWN = ("top5",)
SETTINGS_SHOWN = 30
VALUES_SHOWN = 3
"""How many values of a group's runs a setting tells one by one."""
OTHERS = " They tell what other videos would change, not what other seeds would; behind ± is the deviation over runs."
PAIRED = (
    "In points, paired: each run is compared on the same videos. An interval that leaves out zero is a difference that "
    "the choice of videos hardly explains"
)
TESTED = " The last columns count these videos by top-1, with p of McNemar's exact test."


class _Wording(NamedTuple):
    """What a page says of its figures.

    Attributes:
        intervals: How their intervals were found.
        limit: Where the interval of a difference tells nothing.
    """

    intervals: str
    limit: str


OF_ANSWERS = _Wording(
    "In brackets 95 % intervals: Wilson's for the top-1 and top-5 accuracy of a single run, else by a bootstrap over "
    "videos.",
    ", if some ten videos or more are answered differently; where fewer are, it is too narrow.",
)
OF_SCORES = _Wording(
    "In brackets 95 % intervals by the infinitesimal jackknife over videos.",
    ", if classes have more than a handful of videos.",
)


def comparison_tables(comparison: Comparison) -> list[TerminalTable]:
    """Returns the tables of a comparison for the terminal: figures, differences, settings that differ."""
    tables = []
    for title, header, rows in _contents(comparison):
        if not rows:
            continue
        table = TerminalTable(title=title, title_justify="left")
        for number, name in enumerate(header):
            table.add_column(name, justify="left" if number == 0 or title == "Settings" else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def write_comparison(out: Path, comparison: Comparison) -> Path:
    """Writes `comparison.json` and `report.html` into a folder; returns the page.

    Raises:
        Refused: The folder cannot be written.
        DiskFull: There is no space left.
    """
    make_writable(out)
    names = [group.name for group in comparison.groups]
    found = comparison.found
    wording = OF_SCORES if is_multi_label(found.titles) else OF_ANSWERS
    (_, header, figures), (_, other_header, differences), (_, settings_header, settings) = _contents(comparison)
    drawn = _drawings(names, found.figures, found.titles, "%")
    drawn_differences = _drawings(names[1:], found.differences, found.titles, "points")
    with writing_to(out):
        write_json(out / "comparison.json", _record(comparison))
        write_report(
            out / "report.html",
            title="Comparison",
            summary=f"{', '.join(map(_group_text, comparison.groups))}. {_videos_text(comparison)}",
            headline=_headline(comparison),
            sections=[
                Section(TITLE, parts=[Table(header, figures, wording.intervals + OTHERS), *drawn]),
                Section(
                    f"Differences to {names[0]}",
                    PAIRED + wording.limit + (TESTED if any(found.discordant) else ""),
                    [Table(other_header, differences), *drawn_differences],
                ),
                Section(
                    "Settings",
                    "Those in which the groups differ." if settings else "The runs tell of none in which they differ.",
                    [Table(settings_header, settings, shown=SETTINGS_SHOWN, text=True)] if settings else [],
                ),
                Section("Runs", parts=[Table(("", "folder", "evaluated on"), _runs(comparison), text=True)]),
            ],
        )
    return out / "report.html"


def _contents(comparison: Comparison) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Returns title, header and rows of the three tables."""
    names, found = tuple(group.name for group in comparison.groups), comparison.found
    titles = tuple(found.titles.values())
    figures = [
        (group.name, str(len(group.runs)), *(_figure_text(row[name]) for name in found.titles))
        for group, row in zip(comparison.groups, found.figures, strict=True)
    ]
    tested = ("better on", "worse on", "p") if any(found.discordant) else ()
    differences = [
        (
            name,
            *(_difference_text(row[figure]) for figure in found.titles),
            *_discordant_texts(discordant)[: len(tested)],
        )
        for name, row, discordant in zip(names[1:], found.differences, found.discordant, strict=True)
    ]
    settings = [(name, *map(_values_text, values)) for name, values in comparison.settings.items()]
    settings = [
        row for row in settings if len(set(row[1:])) > 1
    ]  # what the runs of every group vary alike is no setting
    return [
        (TITLE, ("", "runs", *titles), figures),
        (f"Differences to {names[0]}, in points", ("", *titles, *tested), differences),
        ("Settings", ("", *names), settings),
    ]


def _runs(comparison: Comparison) -> list[tuple[str, str, str]]:
    return [(group.name, str(run.folder), set_text(run)) for group in comparison.groups for run in group.runs]


def _figure_text(figure: Compared) -> str:
    spread = "" if figure.deviation is None else f" ± {100 * figure.deviation:.1f}"
    return f"{percent(figure.value).removesuffix(' %')}{spread} % ({interval_text(figure.interval)})"


def _difference_text(difference: Compared) -> str:
    value, low, high = (round(100 * one, 1) + 0.0 for one in (difference.value, *difference.interval))  # no -0.0
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _discordant_texts(discordant: Discordant | None) -> tuple[str, str, str]:
    if discordant is None:
        return "-", "-", "-"
    return str(discordant.better), str(discordant.worse), f"{discordant.p_value:.2g}"


def _values_text(values: Sequence[Any]) -> str:
    told = dict.fromkeys("-" if value is None else str(value) for value in values)
    return ", ".join(told) if len(told) <= VALUES_SHOWN else f"{len(told)} values"


def _group_text(group: Group) -> str:
    return group.name if len(group.runs) == 1 else f"{group.name} ({len(group.runs)} runs)"


def _videos_text(comparison: Comparison) -> str:
    sets = {run.keys: len(run.keys) for run in comparison.groups[0].runs}
    videos = sum(sets.values())
    return f"{videos} videos." if len(sets) == 1 else f"{videos} videos in {len(sets)} sets."


def _headline(comparison: Comparison) -> list[tuple[str, str]]:
    found = comparison.found
    figure, title = next(iter(found.titles.items()))
    shown = list(zip(comparison.groups, found.figures, strict=True))[: HEADLINES - 1]
    best = max(found.differences, key=lambda row: row[figure].value)
    name = comparison.groups[1 + found.differences.index(best)].name
    low, high = (f"{100 * bound:+.1f}" for bound in best[figure].interval)
    return [
        *((percent(row[figure].value), f"{title}, {group.name}") for group, row in shown),
        (f"{100 * best[figure].value:+.1f}", f"points, {name} against {comparison.groups[0].name}, {low} to {high}"),
    ]


def _drawings(
    names: Sequence[str], rows: Sequence[dict[str, Compared]], titles: dict[str, str], unit: str
) -> list[Figure]:
    return [
        Figure(
            intervals(
                names,
                [100 * row[name].value for row in rows],
                [[100 * bound for bound in row[name].interval] for row in rows],
                f"{title}, {unit}",
            )
        )
        for name, title in titles.items()
        if name not in NOT_DRAWN
    ]


def _record(comparison: Comparison) -> dict[str, Any]:
    names = [group.name for group in comparison.groups]
    return {
        "groups": {group.name: [str(run.folder) for run in group.runs] for group in comparison.groups},
        "figures": {
            name: {figure: found._asdict() for figure, found in row.items()}
            for name, row in zip(names, comparison.found.figures, strict=True)
        },
        "reference": names[0],
        "differences": {
            name: {figure: {"value": found.value, "interval": found.interval} for figure, found in row.items()}
            for name, row in zip(names[1:], comparison.found.differences, strict=True)
        },
        "discordant": {
            name: None if found is None else found._asdict()
            for name, found in zip(names[1:], comparison.found.discordant, strict=True)
        },
        "settings": {setting: dict(zip(names, values, strict=True)) for setting, values in comparison.settings.items()},
    }
