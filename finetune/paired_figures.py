"""Figures of groups of runs and their differences, paired video by video.

Shares of right answers have percentile intervals of the bootstrap (Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993): the videos of each set are drawn anew, for the class mean those of each class, and a drawn video
brings what every run made of it, so that differences are paired and a video that several seeds saw counts once. Where
few videos differ such an interval is too narrow, so McNemar's exact test (Psychometrika 12, 1947) stands beside it.

Videos of a multi-label set are neither right nor wrong. Of these, average precision and F1 are compared, by what each
video has to do with the figure of each run (`multi_label.py`), so that these differences are paired as well.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from finetune.figures import ACCURACIES, DRAWS, percentile_interval, telling_accuracies
from finetune.multi_label import TITLES, Estimate, Scores, estimates_of
from finetune.predictions_file import Answers
from finetune.run_results import Group, RunResult


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


class _Stratum(NamedTuple):
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


class Found(NamedTuple):
    """What the bootstrap finds of groups.

    Attributes:
        titles: The figures worth showing, and what they are called.
        figures: For each group each figure.
        differences: For each group but the first, each figure's difference to the first group.
        discordant: For each group but the first the videos that it answers otherwise; None where several runs of a
            group saw the same videos, and on multi-label sets.
    """

    titles: dict[str, str]
    figures: list[dict[str, Compared]]
    differences: list[dict[str, Compared]]
    discordant: list[Discordant | None]


def compare_groups(groups: Sequence[Group]) -> Found:
    """Compares groups, each of which has seen the same sets by the same share of its runs, with the first."""
    if isinstance(groups[0].runs[0].answers, Scores):
        return _of_scores(groups)
    seen = [list(_strata(group, groups[0])) for group in groups]
    return Found(
        telling_accuracies(max(run.classes for group in groups for run in group.runs)),
        [{name: _figure(group, own, name) for name in ACCURACIES} for group, own in zip(groups, seen, strict=True)],
        [{name: _compared(own, seen[0], name) for name in ACCURACIES} for own in seen[1:]],
        [_discordant(groups[0], group, seen[0], own) for group, own in zip(groups[1:], seen[1:], strict=True)],
    )


def _of_scores(groups: Sequence[Group]) -> Found:
    alone = [[estimates_of(_scores(run)) for run in group.runs] for group in groups]
    sets = list(dict.fromkeys(run.videos for run in groups[0].runs))
    figures: list[dict[str, Compared]] = [{} for _ in groups]
    differences: list[dict[str, Compared]] = [{} for _ in groups[1:]]
    for name in TITLES:
        means = [_mean(group, [one[name] for one in own], sets) for group, own in zip(groups, alone, strict=True)]
        for row, group, own, mean in zip(figures, groups, alone, means, strict=True):
            row[name] = Compared(mean.value, group.runs[0].intervals[name])
            if len(group.runs) > 1:
                deviation = float(np.std([one[name].value for one in own], ddof=1))
                row[name] = Compared(mean.value, mean.interval, deviation)
        for row, mean in zip(differences, means[1:], strict=True):
            difference = Estimate(mean.value - means[0].value, mean.slopes - means[0].slopes)
            row[name] = Compared(difference.value, difference.interval)
    return Found(TITLES, figures, differences, [None] * len(differences))


def _mean(group: Group, alone: list[Estimate], sets: Sequence[Any]) -> Estimate:
    """Returns the mean over a group's runs, with the videos of all sets in the order of these."""
    slopes = [
        np.sum([one.slopes for run, one in zip(group.runs, alone, strict=True) if run.videos == videos], axis=0)
        for videos in sets
    ]
    return Estimate(float(np.mean([one.value for one in alone])), np.concatenate(slopes) / len(alone))


def _strata(group: Group, first: Group) -> Iterator[_Stratum]:
    """Yields a group's sets in the order of the first group's."""
    for videos in dict.fromkeys(run.videos for run in first.runs):
        own = [run for run in group.runs if run.videos == videos]
        _, labels = np.unique(own[0].labels, return_inverse=True)
        right, near = (np.mean([getattr(_answers(run), name) for run in own], axis=0) for name in ("right", "near"))
        yield _Stratum(len(own) / len(group.runs), labels, right, near)


def _figure(group: Group, own: list[_Stratum], figure: str) -> Compared:
    """Returns a figure of a group; of a single run with the interval that its evaluation tells."""
    found = _compared(own, None, figure)
    if len(group.runs) > 1:
        return found._replace(deviation=float(np.std([_accuracy_of(run, figure) for run in group.runs], ddof=1)))
    return found._replace(interval=group.runs[0].intervals[figure])


def _compared(own: list[_Stratum], first: list[_Stratum] | None, figure: str) -> Compared:
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


def _discordant(first: Group, other: Group, before: list[_Stratum], own: list[_Stratum]) -> Discordant | None:
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


def _accuracy_of(run: RunResult, figure: str) -> float:
    """Returns an accuracy of one run, as a share."""
    right, near = _answers(run)
    if figure == "mean_class_accuracy":
        labels = np.array(run.labels)
        return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))
    return float((near if figure == "top5" else right).mean())


def _answers(run: RunResult) -> Answers:
    assert isinstance(run.answers, Answers), "runs are compared on the same videos, so of one kind"
    return run.answers


def _scores(run: RunResult) -> Scores:
    assert isinstance(run.answers, Scores), "runs are compared on the same videos, so of one kind"
    return run.answers
