"""The list of samples that are not to be attempted: what an earlier run passed over, or what somebody wrote down."""

import json
from collections.abc import Container
from pathlib import Path

from pretrain.errors import Refused

REMEDY = 'give the skipped.jsonl of a run, or lines like {"key": "films_a-0123456789abcdef"}'


class Quarantine(Container[tuple[int, str]]):
    """The samples not to attempt, as (set, key)."""

    def __init__(self, entries: frozenset[tuple[int | None, str]] = frozenset()) -> None:
        """Takes (set, key) pairs; None stands for every set of a mixture."""
        self._entries = entries

    def __contains__(self, sample: object) -> bool:
        """Whether a (set, key) is in quarantine."""
        assert isinstance(sample, tuple)
        return bool(self._entries) and (sample in self._entries or (None, sample[1]) in self._entries)


def read_quarantine(file: str | None) -> Quarantine:
    """Reads a list of samples, one JSON object with `key` and perhaps `set` in each line.

    Args:
        file: The list; None quarantines nothing.

    Raises:
        Refused: The file cannot be read, or is no such list.
    """
    if file is None:
        return Quarantine()
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise Refused(f"data.quarantine: {file} cannot be read ({reason}); {REMEDY}") from None
    return Quarantine(frozenset(_entry(file, number, line) for number, line in enumerate(lines, 1) if line.strip()))


def _entry(file: str, number: int, line: str) -> tuple[int | None, str]:
    try:
        entry = json.loads(line)
        key, set_number = entry["key"], entry.get("set")
        if isinstance(key, str) and (set_number is None or type(set_number) is int):
            return set_number, key
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise Refused(f"data.quarantine: line {number} of {file} names no sample; {REMEDY}")
