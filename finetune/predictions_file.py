"""Reads the `predictions.jsonl` of an evaluation or a probe, and refuses one that is cut short or altered."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from finetune.figures import TOP
from finetune.multi_label import Scores
from pretrain.errors import Refused

UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)
"""What JSON may raise that is no prediction."""


class Answers(NamedTuple):
    """What a model made of a set whose videos have one label each.

    Attributes:
        right: `(videos,)` whether the most probable class is the true one.
        near: `(videos,)` whether the true class is among the five most probable.
    """

    right: np.ndarray
    near: np.ndarray


class Predictions(NamedTuple):
    """What a model made of the videos of a set, in the order of their keys.

    Attributes:
        keys: The keys.
        labels: For each video the name of its class, or in a multi-label set those of its classes, sorted.
        answers: What the model made of them; of a multi-label set its scores.
    """

    keys: tuple[str, ...]
    labels: tuple[Any, ...]
    answers: Answers | Scores


def read_predictions(file: Path, classes: int, multi_label: bool) -> Predictions:
    """Reads a file of predictions.

    Args:
        file: The file.
        classes: The number of the model's classes.
        multi_label: Whether a video has any number of labels.

    Raises:
        Refused: It cannot be read, holds no video or one twice, or a line is no prediction; names the line.
    """
    if multi_label:
        scored = _read(file, lambda one: _scored(one, classes))
        return Predictions(*_videos(scored), _together(scored, file))
    answered = _read(file, _answered)
    right, near = (np.array([getattr(one, name) for one in answered]) for name in Answers._fields)
    return Predictions(*_videos(answered), Answers(right, near))


class _Answered(NamedTuple):
    key: str
    labels: str
    right: bool
    near: bool


class _Scored(NamedTuple):
    key: str
    labels: tuple[str, ...]
    scores: dict[str, float] | None
    predicted: list[str]


One = TypeVar("One", _Answered, _Scored)


def _read(file: Path, parse: Callable[[Any], One]) -> list[One]:
    """Returns the lines of a file in the order of their keys; `parse` raises something for what is no prediction."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Refused(f"{file}: cannot be read ({reason}); evaluate again with `tubelet evaluate`") from None
    read = []
    for number, line in enumerate(lines, start=1):
        try:
            read.append(parse(json.loads(line)))
        except UNREADABLE:
            raise Refused(f"{file}: line {number} is no prediction; evaluate again with `tubelet evaluate`") from None
    if not read:
        raise Refused(f"{file}: holds no video; evaluate again with `tubelet evaluate`")
    read.sort(key=lambda one: one.key)
    if len({one.key for one in read}) < len(read):
        raise Refused(f"{file}: holds a video twice; evaluate again with `tubelet evaluate`")
    return read


def _videos(read: Sequence[_Answered] | Sequence[_Scored]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    return tuple(one.key for one in read), tuple(one.labels for one in read)


def _answered(one: dict[str, Any]) -> _Answered:
    key, label = _text(one["key"]), _text(one["label"])
    if "error" in one:
        return _Answered(key, label, False, False)
    best = [_text(other["class"]) for other in one["most_probable"]]
    predicted = _text(one["predicted"])
    return _Answered(key, label, predicted == label, label in best[:TOP])


def _scored(one: dict[str, Any], classes: int) -> _Scored:
    labels = tuple(sorted(_texts(one["labels"])))
    if "error" in one:
        return _Scored(_text(one["key"]), labels, None, [])
    scores, predicted = one["scores"], _texts(one["predicted"])
    if len(scores) != classes or not scores.keys() >= {*labels, *predicted}:
        raise ValueError
    if not all(isinstance(score, float) and 0 <= score <= 1 for score in scores.values()):
        raise ValueError
    return _Scored(_text(one["key"]), labels, scores, predicted)


def _together(read: list[_Scored], file: Path) -> Scores:
    """Returns the scores as the evaluation took them: zeros of a video that could not be decoded."""
    told = next((one.scores for one in read if one.scores is not None), None)
    names = sorted({label for one in read for label in one.labels} if told is None else told)
    for one in read:
        if (one.scores is not None and sorted(one.scores) != names) or not set(one.labels) <= set(names):
            raise Refused(f"{file}: {one.key} has other classes than the videos before it; evaluate again")
    scores = [[one.scores[name] if one.scores else 0.0 for name in names] for one in read]
    predicted = [[name in one.predicted for name in names] for one in read]
    labels = [[name in one.labels for name in names] for one in read]
    return Scores(np.array(scores), np.array(predicted, dtype=bool), np.array(labels, dtype=bool))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list):
        raise ValueError
    return list(map(_text, values))
