"""List files that give each video any number of labels, also none: `path label;label` lines, or CSV.

A line's labels are its last field, or what follows a tab, where names of classes hold spaces; `-` stands for none. In a
CSV file the first column is the path, and each other one that is not empty holds a label, or several with `;` between;
a first line whose first column is `path`, `video` or `file` is a heading. Labels are class names or numbers.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from pretrain.data.class_names import read_lines
from pretrain.errors import Refused

SEPARATOR = ";"
NO_LABEL = "-"
"""What stands in place of labels for a video that has none."""
HEADINGS = ("path", "video", "file")
MAX_CLASSES = 100_000


def read_label_lists(file: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """Reads a list of videos with any number of labels.

    Returns:
        Of each video the place of its line, for messages, its path and its labels.

    Raises:
        Refused: The file cannot be read, is empty, or a line has no labels, not even `-`.
    """
    lines = read_lines(file)
    is_csv = file.suffix.lower() == ".csv"
    numbered = [(f"{file}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    entries = _of_csv(file, lines) if is_csv else [_of_line(*one) for one in numbered]
    if not entries:
        raise Refused(f"{file}: empty; write one `path label{SEPARATOR}label` a line")
    if not any(labels for _, _, labels in entries):
        raise Refused(f"{file}: gives no video any label; write `path label{SEPARATOR}label` lines")
    return entries


def classes_of_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the classes: 0 to the highest number if all labels are numbers, else the names, sorted."""
    if not all(re.fullmatch("[0-9]{1,6}", label) for label in labels):
        return tuple(sorted(set(labels)))
    highest = max(map(int, labels))
    if highest >= MAX_CLASSES:
        raise Refused(f"label {highest} is no class number; number the classes from 0")
    return tuple(map(str, range(highest + 1)))


def numbers_of_classes(classes: Sequence[str]) -> dict[str, int]:
    """Returns the class number of each label that may stand for a class: its name, or its number."""
    return {str(number): number for number in range(len(classes))} | {name: n for n, name in enumerate(classes)}


def _of_line(place: str, line: str) -> tuple[str, str, tuple[str, ...]]:
    path, separator, labels = line.partition("\t") if "\t" in line else line.rpartition(" ")
    if not separator or not path.strip():
        raise Refused(
            f"{place}: no labels in {line!r}; write `path label{SEPARATOR}label`, or `path {NO_LABEL}` for none"
        )
    return place, path.strip(), _split(labels)


def _of_csv(file: Path, lines: list[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    reader = csv.reader(f"{line.rstrip()}\n" for line in lines)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise Refused(f"{file}:{reader.line_num}: not a line of CSV ({error}); correct it") from error
    if rows and rows[0][1][0].strip().lower() in HEADINGS:
        del rows[0]
    entries = []
    for number, row in rows:
        if not row[0].strip():
            raise Refused(f"{file}:{number}: has no path in its first column; write the video's path there")
        entries.append((f"{file}:{number}", row[0].strip(), _split(SEPARATOR.join(row[1:]))))
    return entries


def _split(labels: str) -> tuple[str, ...]:
    return tuple(label for one in labels.split(SEPARATOR) if (label := one.strip()) not in ("", NO_LABEL))
