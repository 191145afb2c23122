"""What a run, an evaluation or a probe has left: its predictions and the settings that it ran with, to be compared."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from finetune.evaluation_page import PREDICTIONS, RESULT
from finetune.figures import ACCURACIES, INTERVAL, TOP
from finetune.multi_label import TITLES, Scores
from pretrain.errors import Refused

NOT_SETTINGS = (
    *("out", "resume", "override_config", "tracking", "log_every", "log_keys", "profile"),
    *("checkpoint.", "stopping.", "data.cache.", "data.workers", "workers", "cache.", "validation.every"),
)
"""Fields that change no weight and no figure, and groups of them, which end in a dot."""
RECORDED = ("classes", "samples", "shards", "fingerprint", "views")


class Answers(NamedTuple):
    """What a model made of a set whose videos have one label each.

    Attributes:
        right: `(videos,)` whether the most probable class is the true one.
        near: `(videos,)` whether the true class is among the five most probable.
    """

    right: np.ndarray
    near: np.ndarray


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What one run found on one set.

    Attributes:
        folder: Where it was read.
        shards: The set's folder or URL, and the split of it.
        fingerprint: The set's fingerprint.
        classes: The number of the model's classes.
        keys: The keys of its videos, sorted; all else follows their order.
        labels: For each video the name of its class, or in a multi-label set those of its classes, sorted.
        answers: What the model made of them; of a multi-label set its scores.
        intervals: The 95 % interval of each figure, as the evaluation tells it.
        settings: The fields of the run's configuration by their full names; none where it has no `config.yaml`.
    """

    folder: Path
    shards: str
    fingerprint: str
    classes: int
    keys: tuple[str, ...]
    labels: tuple[str, ...] | tuple[tuple[str, ...], ...]
    answers: Answers | Scores
    intervals: dict[str, list[float]]
    settings: dict[str, Any]

    @property
    def videos(self) -> tuple[Any, Any]:
        """What tells the set's videos from those of another: their keys and labels."""
        return self.keys, self.labels


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one thing.

    Attributes:
        name: Its name.
        runs: What each run found.
    """

    name: str
    runs: tuple[RunResult, ...]


def read_result(folder: str | Path) -> RunResult:
    """Reads a finetuning run, an evaluation's folder or a probe's.

    Raises:
        Refused: Something is missing or damaged; names it.
    """
    run = Path(folder)
    if not run.is_dir():
        raise Refused(f"{run}: is no folder; give finetuning runs or the folders of evaluations")
    places = (run, run / "evaluation", run / "model" / "evaluation")
    place = next((one for one in places if (one / RESULT).is_file()), None)
    if place is None:
        raise Refused(
            f"{run}: holds no {RESULT}; let the run finish, or evaluate it with `tubelet evaluate --model {run} ...`"
        )
    record = _read_record(place / RESULT)
    titles = titles_of(record)
    several = titles is TITLES
    predictions = _read_predictions(place / PREDICTIONS, several)
    if len(predictions) != record["samples"]:
        raise Refused(
            f"{place / PREDICTIONS}: holds {len(predictions)} videos, but {RESULT} {record['samples']}; evaluate again"
        )
    predictions.sort(key=lambda one: one["key"])
    return RunResult(
        folder=run,
        shards=_set_of(record),
        fingerprint=record["fingerprint"],
        classes=record["classes"],
        keys=tuple(one["key"] for one in predictions),
        labels=tuple(tuple(sorted(one["labels"])) if several else one["label"] for one in predictions),
        answers=_scores(predictions) if several else _answers(predictions),
        intervals={name: record[name + INTERVAL] for name in titles},
        settings=_read_settings(place, record.get("model")) | _evaluated_on(record),
    )


def titles_of(record: dict[str, Any]) -> dict[str, str]:
    """Returns all shares among the figures of an `evaluation.json`, and what they are called."""
    return TITLES if TITLES.keys() <= record.keys() else ACCURACIES


def _answers(predictions: list[dict[str, Any]]) -> Answers:
    right = [one.get("predicted") == one["label"] for one in predictions]
    near = [one["label"] in [best["class"] for best in one.get("most_probable", [])][:TOP] for one in predictions]
    return Answers(np.array(right), np.array(near))


def _scores(predictions: list[dict[str, Any]]) -> Scores:
    """Returns the scores as the evaluation took them: a video that could not be decoded has none but zeros."""
    classes = sorted({name for one in predictions for name in (*one["labels"], *one.get("scores", ()))})
    told = [(one.get("scores", {}), one.get("predicted", ()), one["labels"]) for one in predictions]
    scores = [[scores.get(name, 0.0) for name in classes] for scores, _, _ in told]
    predicted, labels = ([[name in part[place] for name in classes] for part in told] for place in (1, 2))
    return Scores(np.array(scores), np.array(predicted, dtype=bool), np.array(labels, dtype=bool))


def _evaluated_on(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the videos and views of an evaluation as settings, which take the place of the run's own."""
    views = {f"views.{name}": value for name, value in record["views"].items()}
    views |= {name: record[name] for name in ("threshold",) if name in record}
    return views | {"evaluated on": f"{_set_of(record)} ({record['fingerprint'][:12]})"}


def _set_of(record: dict[str, Any]) -> str:
    return f"{record['shards']}, {record['split']}" if record.get("split") else str(record["shards"])


def _read_record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
        missing = [name for name in RECORDED if name not in record]
    except (OSError, ValueError, TypeError) as error:
        raise Refused(f"{file}: cannot be read ({error}); evaluate again") from None
    missing = missing or [name + INTERVAL for name in titles_of(record) if name + INTERVAL not in record]
    if missing:
        raise Refused(f"{file}: does not tell {', '.join(missing)}; evaluate again")
    return record


def _read_predictions(file: Path, several: bool) -> list[dict[str, Any]]:
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Refused(f"{file}: cannot be read ({reason}); evaluate again with `tubelet evaluate`") from None
    predictions = []
    for number, line in enumerate(lines, start=1):
        try:
            one = json.loads(line)
            whole = isinstance(one["key"], str) and (_has_scores(one) if several else _has_answer(one))
        except (ValueError, TypeError, KeyError, IndexError):
            whole = False
        if not whole:
            raise Refused(f"{file}: line {number} is no prediction; evaluate again with `tubelet evaluate`")
        predictions.append(one)
    if len({one["key"] for one in predictions}) < len(predictions):
        raise Refused(f"{file}: holds a video twice; evaluate again with `tubelet evaluate`")
    return predictions


def _has_answer(one: dict[str, Any]) -> bool:
    told = "error" in one or bool(one["predicted"] and one["most_probable"][0]["class"])
    return told and isinstance(one["label"], str)


def _has_scores(one: dict[str, Any]) -> bool:
    told = "error" in one or (isinstance(one["predicted"], list) and all(map(math.isfinite, one["scores"].values())))
    return told and isinstance(one["labels"], list)


def _read_settings(place: Path, model: str | None) -> dict[str, Any]:
    """Returns the configuration of the run that a folder is or lies in, else of the one whose model was evaluated."""
    evaluated = [Path(model), Path(model).resolve().parent] if model else []
    folders = (place, *place.resolve().parents[:2], *evaluated)
    file = next((one / "config.yaml" for one in folders if (one / "config.yaml").is_file()), None)
    if file is None:
        return {}
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Refused(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise Refused(f"{file}: is no configuration; restore it")
    return {name: value for name, value in _flattened(content, "") if not _is_no_setting(name)}


def _is_no_setting(name: str) -> bool:
    return any(name.startswith(one) if one.endswith(".") else name == one for one in NOT_SETTINGS)


def _flattened(content: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
