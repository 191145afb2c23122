"""What an evaluation leaves: `evaluation.json`, `predictions.jsonl`, its page, and a table in the terminal."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table as TerminalTable

from finetune.figures import BINS, INTERVAL, Evaluation, reliability, telling_accuracies
from finetune.multi_label import TITLES, LabelsEvaluation, is_multi_label, sections_of
from finetune.output import writing_to
from pretrain.engine.tracking import METRICS, read_metrics
from pretrain.files import write_json, write_text
from pretrain.report import Figure, Section, Table, confusion_matrix, reliability_diagram, write_report
from pretrain.stage import curve_figures

RESULT = "evaluation.json"
PREDICTIONS = "predictions.jsonl"
PAIRS_SHOWN = 15
CLASSES_SHOWN = 20
CLASSES_IN_ORDER = 12
INTERVALS_NOTE = (
    "Intervals cover 95 %: Wilson's score interval over videos; for the class mean, a bootstrap of each class's "
    "videos, or the mean of the classes' own where each is all right or all wrong."
)


def write_evaluation(
    out: Path,
    evaluation: Evaluation | LabelsEvaluation,
    classes: tuple[str, ...],
    record: dict[str, Any],
    hardest: Sequence[Figure] = (),
    curves: Sequence[Figure] = (),
) -> None:
    """Writes `evaluation.json`, `predictions.jsonl` and `report.html`.

    Args:
        out: The folder, which exists.
        evaluation: What was found.
        classes: Names of the classes.
        record: What was evaluated on what, for `evaluation.json` and the page.
        hardest: The hardest videos, drawn.
        curves: The curves of the run that the model comes from.

    Raises:
        Refused: The folder cannot be written.
        DiskFull: There is no space left.
    """
    with writing_to(out):
        write_result(out, evaluation, record)
        write_report(
            out / "report.html",
            title=f"Evaluation on {Path(record['shards']).name}",
            summary=f"{evaluation.figures['samples']} videos, {evaluation.figures['errors']} of them not decodable.",
            headline=headline(evaluation.figures),
            sections=[
                *evaluation_sections(evaluation, classes, hardest),
                *([Section("Curves", "Of the run that the model comes from.", curves)] if curves else []),
            ],
            facts={
                name: views_text(value) if name == "views" else value
                for name, value in record.items()
                if value is not None
            },
        )


def write_result(out: Path, evaluation: Evaluation | LabelsEvaluation, record: dict[str, Any]) -> None:
    """Writes `evaluation.json` and `predictions.jsonl`."""
    write_json(out / RESULT, evaluation.figures | record)
    write_text(out / PREDICTIONS, "".join(json.dumps(one) + "\n" for one in evaluation.predictions))


def curves_of(model: str) -> list[Figure]:
    """Returns the curves of the run that a model folder belongs to; none where it belongs to no run."""
    folder = Path(model).resolve()
    metrics = next((run / METRICS for run in (folder, folder.parent) if (run / METRICS).is_file()), None)
    return curve_figures(read_metrics(metrics)) if metrics else []


def headline(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the shares for the top of a page, the one that counts most at the end."""
    return [
        (percent(figures[name]), f"{title}, {interval_text(figures[name + INTERVAL])}")
        for name, title in reversed(shown_figures(figures).items())
    ]


def shown_figures(figures: dict[str, Any]) -> dict[str, str]:
    """Returns the shares to show of an evaluation, and what they are called."""
    return TITLES if is_multi_label(figures) else telling_accuracies(figures["classes"])


def views_text(views: dict[str, int]) -> str:
    """Returns the views of each video as text."""
    windows, crops = views["temporal"], views["spatial"]
    return f"{windows} time window{'s' * (windows > 1)} x {crops} crop{'s' * (crops > 1)}"


def percent(share: float) -> str:
    """Returns a share as text."""
    return f"{100 * share:.1f} %"


def interval_text(interval: Sequence[float], factor: float = 100) -> str:
    """Returns the bounds of an interval as text."""
    low, high = (f"{factor * bound:.1f}" for bound in interval)
    return f"{low} to {high}"


def figures_table(figures: dict[str, Any]) -> TerminalTable:
    """Returns the figures of an evaluation for the terminal."""
    table = TerminalTable(title=f"{figures['samples']} videos, {figures['errors']} of them not decodable")
    for name in ("figure", "value", "95 % interval"):
        table.add_column(name, justify="left" if name == "figure" else "right", no_wrap=True)
    for name, title in shown_figures(figures).items():
        table.add_row(title, percent(figures[name]), interval_text(figures[name + INTERVAL]))
    if figures.get("calibration_error") is not None:
        table.add_row("calibration error", percent(figures["calibration_error"]), "")
        table.add_row("negative log-likelihood", f"{figures['negative_log_likelihood']:.3f}", "")
    return table


def evaluation_sections(
    evaluation: Evaluation | LabelsEvaluation, classes: tuple[str, ...], hardest: Sequence[Figure] = ()
) -> list[Section]:
    """Returns the body of a page on an evaluation.

    Args:
        evaluation: What was found.
        classes: Names of the classes.
        hardest: The hardest videos, drawn.
    """
    if isinstance(evaluation, LabelsEvaluation):
        return sections_of(evaluation)
    sections = [
        Section("Figures", parts=[_figures_part(evaluation.figures), *_calibration_parts(evaluation)]),
        Section("Confusion", parts=_confusion_parts(evaluation, classes)),
        Section("Classes", parts=[_classes_part(evaluation, classes)]),
    ]
    if hardest:
        text = "The wrongly classified videos with the highest loss, each with frames of its middle view as the model "
        text += "saw them. In brackets the probabilities that it gave."
        sections.append(Section("Hardest videos", text, hardest))
    return sections


def _figures_part(figures: dict[str, Any]) -> Table:
    rows = [
        (title, percent(figures[name]), interval_text(figures[name + INTERVAL]))
        for name, title in telling_accuracies(figures["classes"]).items()
    ]
    caption = INTERVALS_NOTE + (" Videos that could not be decoded count as wrong." if figures["errors"] else "")
    return Table(("accuracy", "value", "95 % interval"), rows, caption, wide=False)


def _calibration_parts(evaluation: Evaluation) -> list[Figure | Table]:
    error = evaluation.figures["calibration_error"]
    if error is None:
        return []
    bins = [one for one in reliability(evaluation.predictions) if one.videos]
    drawing = reliability_diagram(
        [one.probability for one in bins], [one.accuracy for one in bins], [one.videos for one in bins]
    )
    caption = (
        f"Expected calibration error {percent(error)} ({BINS} bins), negative log-likelihood "
        f"{evaluation.figures['negative_log_likelihood']:.3f}, over the decoded videos. Points below the diagonal: the "
        f"model is surer than it is right. A point's area tells how many videos it stands for."
    )
    return [Figure(drawing, caption)]


def _confusion_parts(evaluation: Evaluation, classes: tuple[str, ...]) -> list[Figure | Table]:
    matrix = Figure(confusion_matrix(evaluation.confusion, classes), "Rows are true classes.")
    mistakes = evaluation.confusion.copy()
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:PAIRS_SHOWN]
    rows = [
        (classes[true], classes[predicted], int(mistakes[true, predicted]), percent(share))
        for true, predicted in zip(*np.unravel_index(order, mistakes.shape), strict=True)
        if (share := mistakes[true, predicted] / max(evaluation.videos[true], 1))
    ]
    header = ("true class", "taken for", "videos", "of the class")
    beside = len(classes) <= CLASSES_IN_ORDER
    return [matrix, Table(header, rows, "The most frequent confusions.", wide=not beside)] if rows else [matrix]


def _classes_part(evaluation: Evaluation, classes: tuple[str, ...]) -> Table:
    """Returns each class's accuracy over all of its videos; of many classes the worst first."""
    right = evaluation.confusion.diagonal()
    share = np.where(evaluation.videos > 0, right / np.maximum(evaluation.videos, 1), np.inf)
    many = len(classes) > CLASSES_IN_ORDER
    order = np.argsort(share, kind="stable") if many else np.arange(len(classes))
    rows = [
        (classes[one], int(evaluation.videos[one]), percent(share[one]) if evaluation.videos[one] else "-")
        for one in order
    ]
    return Table(("class", "videos", "right"), rows, "The worst first." if many else "", shown=CLASSES_SHOWN)
