"""Comparison of runs on the same videos: figures with intervals, and differences paired video by video.

A group is one or more runs of one thing: seeds on one set, or folds, each on a set of its own. Its figures are the
means over its runs. Intervals, which `paired_figures.py` finds, tell what other videos would change, not what other
seeds would: the spread over the runs stands beside them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.multi_label import Scores
from finetune.paired_figures import Found, compare_groups
from finetune.run_results import Group, RunResult, read_result
from pretrain.errors import Refused

PARTS_OF_RUNS = ("evaluation", "model")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        groups: The groups, in their order.
        found: Their figures and differences.
        settings: The settings in which runs differ: for each the values of each group's runs.
    """

    groups: tuple[Group, ...]
    found: Found
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
    _refuse_other_kinds([run for group in read for run in group.runs])
    for other in read[1:]:
        _refuse_other_videos(read[0], other)
    return Comparison(read, compare_groups(read), _differing_settings(read))


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


def _refuse_other_kinds(runs: list[RunResult]) -> None:
    """Raises `Refused` unless all runs are of multi-label sets, or none is."""
    kinds = {isinstance(run.answers, Scores): run.folder for run in runs}
    if len(kinds) > 1:
        raise Refused(
            f"{kinds[True]}: was evaluated on a multi-label set, and {kinds[False]} on one label a video; evaluate "
            f"them on the same videos"
        )


def _refuse_other_videos(first: Group, other: Group) -> None:
    """Raises `Refused` unless two groups were evaluated on the same sets, each by the same share of their runs."""
    for one, another in ((first, other), (other, first)):
        seen = {run.videos for run in another.runs}
        for run in one.runs:
            if run.videos not in seen:
                raise Refused(
                    f"{run.folder}: was evaluated on {set_text(run)}, and no run of {another.name} was, but on "
                    f"{set_text(another.runs[0])}; evaluate them on the same videos"
                )
    for videos in {run.videos for run in first.runs}:
        counts = [sum(run.videos == videos for run in group.runs) for group in (first, other)]
        if counts[0] * len(other.runs) != counts[1] * len(first.runs):
            known = next(run for run in first.runs if run.videos == videos)
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
