"""Divides samples into parts, one of which is held out: by class and by source video, as a pure function of keys.

    group    samples that are never parted: the segments of one video, or those whose keys a rule finds alike
    part     training and validation, or the folds of a cross-validation; each has a weight, its share of every class
    order    groups are dealt out by size, the largest first, and by a hash of seed and key: where shards lie, how many
             processes read them and what else was packed into which shard change nothing

Each group goes to the part that has least of its classes for its weight (the method of Sainte-Lague, and the first of
each class before all others), so that every class is in every part where it has as many groups as there are parts.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pretrain.data.randomness import key_for
from pretrain.errors import Refused

NO_CLASS = -1
"""What samples without any class count as: a class of their own."""
SEGMENT_OF_KEY = re.compile(r"-\d{9,}-\d{9,}$")
"""What the key of a segment has behind that of its video."""


def groups_of(keys: Sequence[str], rule: str | None) -> list[str]:
    """Returns the group of each sample.

    Args:
        keys: The keys.
        rule: A regular expression: samples in whose keys its groups, or all of it where it has none, find the same text
            are one group. None parts no segments of one video.

    Raises:
        Refused: The rule is no regular expression, or finds nothing in a key.
    """
    if rule is None:
        return [SEGMENT_OF_KEY.sub("", key) for key in keys]
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise Refused(f"validation.group: {rule!r} is no regular expression ({error}); correct it") from None
    groups = []
    for key in keys:
        match = pattern.search(key)
        if match is None:
            raise Refused(f"validation.group: {rule!r} finds nothing in the key {key}; give a rule for every key")
        groups.append("\0".join(text or "" for text in match.groups() or (match.group(),)))
    return groups


def parts_of(groups: Sequence[str], labels: Sequence[Sequence[int]], weights: Sequence[float], seed: int) -> np.ndarray:
    """Returns `(samples,)` numbers of the parts that samples go to.

    Args:
        groups: The group of each sample.
        labels: The classes of each sample, one or any number; none in an unlabelled set.
        weights: The weight of each part.
        seed: Chooses among equals.
    """
    members: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    labels = [own or (NO_CLASS,) for own in labels]
    totals = Counter(label for own in labels for label in own)
    held: list[Counter[int]] = [Counter() for _ in weights]
    sizes = [0] * len(weights)
    parts = np.empty(len(groups), dtype=np.int64)
    for group in sorted(members, key=lambda group: (-len(members[group]), key_for(seed, group, "part"))):
        counts = sorted(Counter(label for number in members[group] for label in labels[number]).items())

        def fullness(part: int, counts: list[tuple[int, int]] = counts) -> tuple[float, float]:
            of_classes = (
                count / totals[label] * (2 * held[part][label] + count) / weights[part]
                for label, count in counts
                if held[part][label]
            )
            return sum(of_classes), sizes[part] / weights[part]

        chosen = min(range(len(weights)), key=fullness)
        held[chosen].update(dict(counts))
        sizes[chosen] += len(members[group])
        parts[members[group]] = chosen
    return parts
