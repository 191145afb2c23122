"""Class names in the order of their numbers: as given by a user, a labels file of a data set, or a packed shard set."""

import json
import os
import re
from pathlib import Path

from pretrain.errors import Refused

SHARD_SET_INDEX = "index.json"
LONGEST_SHOWN = 200
"""Characters of names that a message repeats."""


def read_classes(classes: str) -> tuple[str, ...]:
    """Reads class names in the order of their numbers.

    Args:
        classes: A text file with one name a line, or with `1 NAME` lines if it is called classInd.txt; a JSON file that
            maps names to numbers from 0; a folder of shards, whose classes are taken; or names separated by commas.

    Raises:
        Refused: There is no such file and no comma, it cannot be read, a name stands twice, or a number is missing.
    """
    path = Path(classes)
    is_file = os.path.isfile(path)  # unlike pathlib's, at ease with names that are too long for a file
    if os.path.isdir(path):
        names = _of_shards(path)
    elif is_file and path.suffix.lower() == ".json":
        names = _of_numbered(path, {name: str(number) for name, number in _json_object(path).items()}, first=0)
    elif is_file and path.name == "classInd.txt":
        names = _of_class_index(path)
    elif is_file:
        names = [line.strip() for line in read_lines(path)]
    elif "," in classes:
        names = [name.strip() for name in classes.split(",")]
    else:
        raise Refused(
            f"classes: {classes} is no file; name a file with one class a line, a folder of shards with these classes, "
            "or the names with commas between"
        )
    names = [name for name in names if name]
    repeated = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if repeated is not None or not names:
        shown = classes if len(classes) <= LONGEST_SHOWN else f"{classes[:LONGEST_SHOWN]}..."
        raise Refused(
            f"classes: {f'{repeated!r} stands twice' if names else 'no name'} in {shown}; name each class once"
        )
    return tuple(names)


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file; bytes that are no UTF-8 are kept as the file system would name them.

    Raises:
        Refused: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}); name a text file of lines") from error


def _of_shards(folder: Path) -> list[str]:
    if not (folder / SHARD_SET_INDEX).is_file():
        raise Refused(f"classes: {folder} holds no {SHARD_SET_INDEX}; name a folder of finished shards, or a file")
    names = _json_object(folder / SHARD_SET_INDEX).get("classes")
    if not names or not isinstance(names, list):
        raise Refused(f"classes: the shards of {folder} have no labels; name a folder of labelled shards, or a file")
    return [str(name) for name in names]


def _of_class_index(path: Path) -> list[str]:
    numbers: dict[str, str] = {}
    for line in read_lines(path):
        number, _, name = line.strip().partition(" ")
        if name.strip() in numbers:
            raise Refused(f"classes: {name.strip()!r} stands twice in {path}; name each class once")
        if line.strip():
            numbers[name.strip()] = number
    return _of_numbered(path, numbers, first=1)


def _of_numbered(path: Path, numbers: dict[str, str], first: int) -> list[str]:
    """Returns the names in the order of their numbers, which must be `first` and all that follow."""
    wanted = {str(first + place): place for place in range(len(numbers))}
    if set(numbers.values()) != wanted.keys() or len(set(numbers.values())) < len(numbers):
        strange = next((name for name, number in numbers.items() if number not in wanted), path.name)
        raise Refused(
            f"classes: {path} does not number its classes from {first} without gaps (see {strange!r}); correct it"
        )
    return sorted(numbers, key=lambda name: wanted[numbers[name]])


def _json_object(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise Refused(f"classes: {path} cannot be read ({' '.join(str(error).split())}); name a JSON file") from error
    if not isinstance(content, dict):
        raise Refused(f'classes: {path} is no list of classes; name a JSON file like {{"NAME": "0"}}')
    return content


def matches_name(folder: str, label: str) -> bool:
    """Tells whether a folder is called after a class: data sets are unpacked with _ for spaces, and without quotes."""
    return _letters(folder) == _letters(label)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())
