"""The official annotation files of Kinetics, Something-Something v2, UCF101 and HMDB51: which videos, which labels.

Each is recognised by what it is, so a user names it and nothing else:

- Kinetics 400, 600 and 700: a CSV file with the columns label, youtube_id, time_start, time_end and split. A video is
  called ID_000010_000020 (start and end in seconds) if it was cut, or ID if it is the whole video from YouTube.
- Something-Something v2: a JSON list of entries with id and template, beside its labels JSON.
- UCF101: `trainlist01.txt` and the like, beside classInd.txt, or the folder that holds them.
- HMDB51: the folder of `CLASS_test_split1.txt` and the like, with 1 for training, 2 for testing and 0 for neither.

Nothing here looks for the videos: `sources.py` does.
"""

import csv
import dataclasses
import json
import math
import os
import posixpath
import re
from pathlib import Path

from pretrain.data.class_names import read_classes, read_lines
from pretrain.data.segments import Segment
from pretrain.errors import Refused

KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")
HMDB51_NAME = re.compile(r"(.+)_test_split([123])\.txt")
HMDB51_TAGS = {"0": None, "1": "train", "2": "test"}
UCF101_NAME = re.compile(r"(train|test)list0?[123]\.txt")
UCF101_CLASSES = "classInd.txt"
ALL_SPLITS = "all"
SPLIT_NAMES = tuple(f"{part}{number}" for number in (1, 2, 3) for part in ("train", "test"))
"""The splits that a folder of UCF101 or HMDB51 holds."""
LABELS_PATTERN = "*labels.json"


@dataclasses.dataclass(frozen=True)
class Annotation:
    """A line of an annotation file.

    Attributes:
        place: The file and the line or entry, for messages.
        label: The name of its class; None if the file gives none.
        files: The names under which the video may lie, the preferred one first, each with the segment to cut out of it
            (None: all of it). The folder in a name counts only if there is such a folder, the suffix not at all.
        split: The split that the line puts it in, where all splits are read.
    """

    place: str
    label: str | None
    files: tuple[tuple[str, Segment | None], ...]
    split: str | None = None


@dataclasses.dataclass(frozen=True)
class Annotations:
    """What an annotation file lists.

    Attributes:
        entries: Its lines, in order.
        class_order: What holds the class names in the order of their numbers; None for the sorted names.
        classes: The sorted names, of all splits where the file tells them.
    """

    entries: tuple[Annotation, ...]
    class_order: Path | None
    classes: tuple[str, ...]

    def ordered_classes(self) -> tuple[str, ...]:
        """Returns the class names in the data set's own order.

        Raises:
            Refused: The file that holds the order is missing or damaged.
        """
        if self.class_order is None:
            return self.classes
        if not self.class_order.exists():
            raise Refused(
                f"{self.class_order}: is missing, and it holds the order of the classes; put it there, or name another "
                "list of them with --classes"
            )
        return read_classes(str(self.class_order))


def read_annotations(path: Path, split: str | None = None) -> Annotations:
    """Reads the official annotation file or folder of a data set.

    Args:
        path: The file or folder.
        split: The part to take: of a Kinetics file one that its split column names (None: every line); of a folder of
            UCF101 or HMDB51 train1, test1 and so on to test3. `all` takes every split, and a video then has an entry
            for each split that it is in. The other files are one split each.

    Raises:
        Refused: It is not recognised, cannot be read, is damaged or empty, or has no such split.
    """
    kind = _kind_of(path)
    if kind == "kinetics":
        annotations = _kinetics(path, split)
    elif kind in ("hmdb51", "ucf101") and path.is_dir():
        checked = _checked_split(path, split)
        annotations = _all_splits(path, kind) if checked == ALL_SPLITS else _split_of_folder(path, kind, checked)
    elif split is not None:
        raise Refused(f"split: {path} is one split already; drop --split, or name the file of the other split")
    else:
        annotations = _ucf101(path) if kind == "ucf101" else _something_something(path)
    if not annotations.entries:
        raise Refused(f"{path}: lists no video{f' of the split {split}' if split else ''}; name another file")
    return annotations


def _kind_of(path: Path) -> str:
    if not os.path.exists(path):
        raise Refused(f"{path}: no such file; name the annotation file of a data set")
    if path.is_dir():
        names = [entry.name for entry in path.iterdir()]
        if any(HMDB51_NAME.fullmatch(name) for name in names):
            return "hmdb51"
        if any(UCF101_NAME.fullmatch(name) for name in names):
            return "ucf101"
        raise Refused(
            f"{path}: holds neither CLASS_test_split1.txt (HMDB51) nor trainlist01.txt (UCF101); name the folder that "
            "does, or an annotation file"
        )
    if HMDB51_NAME.fullmatch(path.name):
        raise Refused(f"{path}: is for one class; name its folder, {path.parent}, and a --split such as train1")
    known = {".csv": "kinetics", ".json": "ssv2"} | ({".txt": "ucf101"} if UCF101_NAME.fullmatch(path.name) else {})
    if path.suffix.lower() not in known:
        raise Refused(
            f"{path}: not an annotation file that is known here (Kinetics .csv, Something-Something v2 .json, UCF101 "
            "trainlist01.txt, folder of HMDB51); name one, or a file of `path label` lines with --list"
        )
    return known[path.suffix.lower()]


def _checked_split(path: Path, split: str | None) -> str:
    if split not in (*SPLIT_NAMES, ALL_SPLITS):
        given = "is missing" if split is None else f"{split!r} is none"
        names = ", ".join(SPLIT_NAMES)
        raise Refused(f"split: {given} of those that {path} may hold; use one of {names}, or {ALL_SPLITS} of them")
    return split


def _split_of_folder(folder: Path, kind: str, split: str) -> Annotations:
    return _hmdb51(folder, split) if kind == "hmdb51" else _ucf101(_ucf101_list(folder, split))


def _ucf101_list(folder: Path, split: str) -> Path:
    return folder / f"{split[:-1]}list0{split[-1]}.txt"


def _all_splits(folder: Path, kind: str) -> Annotations:
    """Every split that a folder holds; the entries of a video that is in several follow the order of the splits."""
    names = [split for split in SPLIT_NAMES if kind == "hmdb51" or _ucf101_list(folder, split).is_file()]
    parts = {split: _split_of_folder(folder, kind, split) for split in names}
    entries = [dataclasses.replace(entry, split=split) for split, part in parts.items() for entry in part.entries]
    classes = tuple(sorted({name for part in parts.values() for name in part.classes}))
    return Annotations(tuple(entries), parts[names[0]].class_order, classes)


def _kinetics(path: Path, split: str | None) -> Annotations:
    reader = csv.DictReader(line + "\n" for line in read_lines(path) if line.strip())
    columns = [str(column).strip() for column in reader.fieldnames or ()]
    missing = [column for column in KINETICS_COLUMNS if column not in columns]
    if missing:
        raise Refused(f"{path}: has no column {missing[0]}, which a file of Kinetics has; name its official CSV file")
    if split is not None and "split" not in columns:
        raise Refused(f"split: {path} has no column of that name; drop --split")
    reader.fieldnames = columns
    try:
        rows = [(f"{path}:{reader.line_num}", {key: value or "" for key, value in row.items()}) for row in reader]
    except csv.Error as error:
        raise Refused(f"{path}:{reader.line_num}: not a line of CSV ({error}); download the file again") from error
    splits = sorted({row["split"] for _, row in rows}) if split is not None else []
    if split not in (None, ALL_SPLITS, *splits):
        raise Refused(f"split: {path} has no {split!r}; use one of {', '.join(splits)}, or {ALL_SPLITS} of them")
    kept = [(place, row) for place, row in rows if split in (None, ALL_SPLITS) or row["split"] == split]
    entries = tuple(_kinetics_entry(place, row, split == ALL_SPLITS) for place, row in kept)
    return Annotations(entries, None, tuple(sorted({row["label"] for _, row in rows if row.get("label")})))


def _kinetics_entry(place: str, row: dict[str, str], with_split: bool) -> Annotation:
    name = row["youtube_id"].strip()
    try:
        start_s, end_s = float(row["time_start"]), float(row["time_end"])
    except ValueError:
        start_s = end_s = math.nan
    if not name or not 0 <= start_s < end_s < math.inf:
        raise Refused(
            f"{place}: gives no segment of a video (youtube_id {name!r}, time_start {row['time_start']!r}, time_end "
            f"{row['time_end']!r}); correct or remove the line"
        )
    whole = Segment(round(start_s * 1000), round(end_s * 1000))
    files = ((f"{name}_{int(start_s):06d}_{int(end_s):06d}.mp4", None), (f"{name}.mp4", whole))
    split = "_".join(row["split"].split()) if with_split else None
    return Annotation(place, row.get("label") or None, files, split or None)


def _something_something(path: Path) -> Annotations:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: not a JSON file ({error}); download it again") from error
    if not isinstance(content, list):
        raise Refused(
            f"{path}: not a list of videos as Something-Something v2 has; name its train or validation JSON file (of "
            "Kinetics the CSV file)"
        )
    entries = []
    for number, entry in enumerate(content, start=1):
        place = f"{path}: entry {number}"
        if not isinstance(entry, dict) or not str(entry.get("id", "")).strip():
            raise Refused(f"{place} has no id; name the official train or validation JSON file")
        label = str(entry.get("template", "")).replace("[", "").replace("]", "").strip()
        entries.append(Annotation(place, label or None, ((f"{entry['id']}.webm", None),)))
    found = sorted(path.parent.glob(LABELS_PATTERN))
    names = tuple(sorted({entry.label for entry in entries if entry.label is not None}))
    return Annotations(tuple(entries), found[0] if found else path.parent / "labels.json", names)


def _ucf101(path: Path) -> Annotations:
    if not path.exists():
        raise Refused(f"{path}: no such file; name a folder that holds this split")
    order = path.parent / UCF101_CLASSES
    numbers = {name: number for number, name in enumerate(read_classes(str(order)), 1)} if order.is_file() else {}
    entries = []
    for line_number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        video, _, number = line.strip().partition(" ")
        label = posixpath.dirname(video)
        if not label or (number and label in numbers and number.strip() != str(numbers[label])):
            raise Refused(
                f"{path}:{line_number}: {line.strip()!r} is not `CLASS/VIDEO.avi NUMBER` with the number that "
                f"{UCF101_CLASSES} gives to the class; download the split files again"
            )
        entries.append(Annotation(f"{path}:{line_number}", label, ((video, None),)))
    return Annotations(tuple(entries), order, tuple(sorted({str(entry.label) for entry in entries})))


def _hmdb51(folder: Path, split: str) -> Annotations:
    entries, classes = [], set()
    for path in sorted(folder.iterdir()):
        match = HMDB51_NAME.fullmatch(path.name)
        if match is None:
            continue
        label, number = match.groups()
        classes.add(label)
        for line_number, line in enumerate(read_lines(path) if number == split[-1] else [], start=1):
            video, _, tag = line.strip().rpartition(" ")
            if line.strip() and (tag not in HMDB51_TAGS or not video):
                raise Refused(
                    f"{path}:{line_number}: {line.strip()!r} is not `VIDEO.avi TAG` with 0, 1 or 2; download the split "
                    "files again"
                )
            if line.strip() and HMDB51_TAGS[tag] == split[:-1]:
                entries.append(Annotation(f"{path}:{line_number}", label, ((f"{label}/{video.strip()}", None),)))
    return Annotations(tuple(entries), None, tuple(sorted(classes)))
