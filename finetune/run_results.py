"""What a run, an evaluation or a probe has left: its predictions and the settings that it ran with, to be compared."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from finetune.evaluation_page import PREDICTIONS, RESULT
from finetune.figures import ACCURACIES, INTERVAL
from finetune.multi_label import TITLES, Scores, is_multi_label
from finetune.predictions_file import Answers, read_predictions
from pretrain.errors import Refused

NOT_SETTINGS = (
    *("out", "resume", "override_config", "tracking", "log_every", "log_keys", "profile"),
    *("checkpoint.", "stopping.", "data.cache.", "data.workers", "workers", "cache.", "validation.every"),
)
"""Fields that change no weight and no figure, and groups of them, which end in a dot."""
RECORDED = {"classes": int, "samples": int, "shards": str, "fingerprint": str, "views": dict}
"""What an `evaluation.json` tells beside its figures, and of which type it is."""


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
    labels: tuple[Any, ...]
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
    found = read_predictions(place / PREDICTIONS, record["classes"], is_multi_label(record))
    if len(found.keys) != record["samples"]:
        raise Refused(
            f"{place / PREDICTIONS}: holds {len(found.keys)} videos, but {RESULT} {record['samples']}; evaluate again"
        )
    return RunResult(
        folder=run,
        shards=_set_of(record),
        fingerprint=record["fingerprint"],
        classes=record["classes"],
        **found._asdict(),
        intervals={name: record[name + INTERVAL] for name in _figures_of(record)},
        settings=_read_settings(place, record.get("model")) | _evaluated_on(record),
    )


def _evaluated_on(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the videos and views of an evaluation as settings, which take the place of the run's own."""
    views = {f"views.{name}": value for name, value in record["views"].items()}
    if is_multi_label(record):
        views["threshold"] = record.get("threshold")
    return views | {"evaluated on": f"{_set_of(record)} ({record['fingerprint'][:12]})"}


def _set_of(record: dict[str, Any]) -> str:
    return f"{record['shards']}, {record['split']}" if record.get("split") else str(record["shards"])


def _read_record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
        if not isinstance(record, dict):
            raise TypeError("it holds no object")
        missing = [name for name in RECORDED if name not in record]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise Refused(f"{file}: cannot be read ({error}); evaluate again") from None
    missing = missing or [name + INTERVAL for name in _figures_of(record) if name + INTERVAL not in record]
    if missing:
        raise Refused(f"{file}: does not tell {', '.join(missing)}; evaluate again")
    wrong = [name for name, kind in RECORDED.items() if not isinstance(record[name], kind)]
    wrong += [name for name in ("model", "split") if not isinstance(record.get(name), str | None)]
    wrong += [name + INTERVAL for name in _figures_of(record) if not _is_interval(record[name + INTERVAL])]
    if wrong:
        raise Refused(f"{file}: {', '.join(wrong)} cannot be so; evaluate again")
    return record


def _figures_of(record: dict[str, Any]) -> dict[str, str]:
    return TITLES if is_multi_label(record) else ACCURACIES


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(one, float | int) for one in value)


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
