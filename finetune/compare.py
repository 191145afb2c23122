"""Comparison of runs on the same videos: figures with intervals, and differences paired video by video.

A group is one or more runs of one thing: seeds on one set, or folds, each on a set of its own. Its figures are the
means over its runs. Intervals are percentile intervals of the bootstrap (Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993): the videos of each set are drawn anew, for the class mean those of each class, and a drawn video
brings what every run made of it, so that differences are paired and a video that several seeds saw counts once. They
tell what other videos would change, not what other seeds would: the spread over the runs stands beside them. Where few
videos differ such an interval is too narrow, so that McNemar's exact test (Psychometrika 12, 1947) stands beside it.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from finetune.figures import ACCURACIES, DRAWS, percentile_interval
from finetune.run_results import RunResult, read_result
from pretrain.errors import Refused

PARTS_OF_RUNS = ("evaluation", "model")
Videos = tuple[tuple[str, ...], tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one thing.

    Attributes:
        name: Its name.
        runs: What each run found.
    """

    name: str
    runs: tuple[RunResult, ...]


class Compared(NamedTuple):
    """A figure of a group, or its difference to the first group.

    Attributes:
        value: The mean over the runs.
        interval: Its 95 % interval.
        deviation: The standard deviation over the runs; None for a single one and for differences.
    """

    value: float
    interval: list[float]
    deviation: float | None = None


class Discordant(NamedTuple):
    """The videos that two groups answer differently, where each saw every video once.

    Attributes:
        better: Videos that the group has right and the first one has wrong.
        worse: The other way round.
        p_value: Of McNemar's exact test: how probable so uneven a split is if both groups are equally good.
    """

    better: int
    worse: int
    p_value: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        groups: The groups, in their order.
        figures: For each group each accuracy.
        differences: For each group but the first, each accuracy's difference to the first group.
        discordant: For each group but the first the videos that it answers otherwise; None where several runs of a
            group saw the same videos.
        settings: The settings in which runs differ: for each the values of each group's runs.
    """

    groups: tuple[Group, ...]
    figures: list[dict[str, Compared]]
    differences: list[dict[str, Compared]]
    discordant: list[Discordant | None]
    settings: dict[str, list[list[Any]]]


def compare(groups: Sequence[tuple[str, Sequence[str]]]) -> Comparison:
    """Compares runs that were evaluated on the same videos.

    Args:
        groups: For each group its name and the folders of its runs; differences are to the first one.

    Raises:
        Refused: There is nothing to compare, a folder lacks a file or holds a damaged one, or the videos differ.
    """
    _refuse_wrong_groups(groups)
    read = tuple(Group(name, tuple(read_result(folder) for folder in folders)) for name, folders in groups)
    for other in read[1:]:
        _refuse_other_videos(read[0], other)
    seen = [list(_strata(group, read[0])) for group in read]
    return Comparison(
        read,
        [{name: _figure(group, own, name) for name in ACCURACIES} for group, own in zip(read, seen, strict=True)],
        [{name: _compared(own, seen[0], name) for name in ACCURACIES} for own in seen[1:]],
        [_discordant(read[0], group, seen[0], own) for group, own in zip(read[1:], seen[1:], strict=True)],
        _differing_settings(read),
    )


def names_of(folders: Sequence[str]) -> list[str]:
    """Returns short names of runs: the last parts of their paths that tell them apart, and what they belong to."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(one[-length - (one[-1] in PARTS_OF_RUNS) :]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return list(folders)


def set_text(run: RunResult) -> str:
    """Returns the set that a run was evaluated on, as text."""
    return f"{run.shards} (fingerprint {run.fingerprint[:12]}, {len(run.keys)} videos)"


class Stratum(NamedTuple):
    """What the runs of a group found on one set.

    Attributes:
        share: The share of the group's runs that saw this set.
        labels: `(videos,)` numbers of the true classes.
        right: `(videos,)` share of those runs of which the most probable class is the true one.
        near: `(videos,)` share of those runs of which it is among the five most probable.
    """

    share: float
    labels: np.ndarray
    right: np.ndarray
    near: np.ndarray


def _strata(group: Group, first: Group) -> Iterator[Stratum]:
    """Yields a group's sets in the order of the first group's."""
    for videos in dict.fromkeys(map(_videos, first.runs)):
        own = [run for run in group.runs if _videos(run) == videos]
        _, labels = np.unique(own[0].labels, return_inverse=True)
        right, near = (np.mean([getattr(run, name) for run in own], axis=0) for name in ("right", "near"))
        yield Stratum(len(own) / len(group.runs), labels, right, near)


def _figure(group: Group, own: list[Stratum], figure: str) -> Compared:
    """Returns a figure of a group; of a single run with the interval that its evaluation tells."""
    found = _compared(own, None, figure)
    if len(group.runs) > 1:
        return found._replace(deviation=float(np.std([accuracy_of(run, figure) for run in group.runs], ddof=1)))
    return found._replace(interval=group.runs[0].intervals[figure])


def _compared(own: list[Stratum], first: list[Stratum] | None, figure: str) -> Compared:
    """Returns a figure of a group, or where another is given, its difference to that one's."""
    name = "near" if figure == "top5" else "right"
    random = np.random.default_rng(0)
    value, drawn = 0.0, np.zeros(DRAWS)
    for number, stratum in enumerate(own):
        outcome = getattr(stratum, name) * stratum.share
        if first is not None:
            outcome = outcome - getattr(first[number], name) * first[number].share
        by_class = figure == "mean_class_accuracy"
        parts = [outcome[stratum.labels == label] for label in np.unique(stratum.labels)] if by_class else [outcome]
        value += float(np.mean([part.mean() for part in parts]))
        drawn += np.mean([_drawn_means(part, random) for part in parts], axis=0)
    return Compared(value, percentile_interval(drawn))


def _discordant(first: Group, other: Group, before: list[Stratum], own: list[Stratum]) -> Discordant | None:
    """Returns the videos that a group answers otherwise than the first; None where answers are means over runs."""
    if not len(first.runs) == len(other.runs) == len(own):
        return None
    gains = np.concatenate([one.right - another.right for one, another in zip(own, before, strict=True)])
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    p_value = binomtest(better, better + worse).pvalue if better + worse else 1.0
    return Discordant(better, worse, float(p_value))


def _drawn_means(outcome: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns the means `(DRAWS,)` of videos drawn anew: how often each outcome is drawn is multinomial."""
    values, counts = np.unique(outcome, return_counts=True)
    return random.multinomial(len(outcome), counts / len(outcome), size=DRAWS) @ values / len(outcome)


def accuracy_of(run: RunResult, figure: str) -> float:
    """Returns an accuracy of one run, as a share."""
    if figure == "mean_class_accuracy":
        return float(np.mean([run.right[run.labels == label].mean() for label in np.unique(run.labels)]))
    return float((run.near if figure == "top5" else run.right).mean())


def _videos(run: RunResult) -> Videos:
    return run.keys, tuple(run.labels.tolist())


def _refuse_wrong_groups(groups: Sequence[tuple[str, Sequence[str]]]) -> None:
    if len(groups) < 2:
        raise Refused("RUN: two runs or groups are needed at least; give more, or see tubelet compare --help")
    names = [name for name, _ in groups]
    for name, folders in groups:
        if names.count(name) > 1:
            raise Refused(f"{name}: stands twice; give each run once, and each --group a name of its own")
        if not folders:
            raise Refused(f"--group {name}: has no runs; give their folders after the name")
        twice = [one for one in folders if [Path(other).resolve() for other in folders].count(Path(one).resolve()) > 1]
        if twice:
            raise Refused(f"--group {name}: holds {twice[0]} twice; give each run once")


def _refuse_other_videos(first: Group, other: Group) -> None:
    """Raises `Refused` unless two groups were evaluated on the same sets, each by the same share of their runs."""
    for one, another in ((first, other), (other, first)):
        seen = {_videos(run) for run in another.runs}
        for run in one.runs:
            if _videos(run) not in seen:
                raise Refused(
                    f"{run.folder}: was evaluated on {set_text(run)}, and no run of {another.name} was, but on "
                    f"{set_text(another.runs[0])}; evaluate them on the same videos"
                )
    for videos in {_videos(run) for run in first.runs}:
        counts = [sum(_videos(run) == videos for run in group.runs) for group in (first, other)]
        if counts[0] * len(other.runs) != counts[1] * len(first.runs):
            known = next(run for run in first.runs if _videos(run) == videos)
            raise Refused(
                f"--group: on {set_text(known)} there are {counts[0]} of the {len(first.runs)} runs of {first.name}, "
                f"but {counts[1]} of the {len(other.runs)} of {other.name}; give each as many runs on each set"
            )


def _differing_settings(groups: Sequence[Group]) -> dict[str, list[list[Any]]]:
    """Returns the values of each group's runs for each setting in which any two runs that have it differ."""
    runs = [run for group in groups for run in group.runs]
    names = dict.fromkeys(name for run in runs for name in run.settings)
    differing = [name for name in names if len({repr(run.settings[name]) for run in runs if name in run.settings}) > 1]
    return {name: [[run.settings.get(name) for run in group.runs] for group in groups] for name in differing}
