"""Which videos to pack, with which labels, under which keys: a folder, class folders, a list or an annotation file.

Nothing here opens a video. A folder's videos are found at any depth by their suffix; in a folder without any video,
images are, each a video of one frame. If each of them lies in some first-level folder, those folders are the classes,
sorted by name; if any lies directly in the folder, or with `unlabelled`, the set has no labels. A list file holds `path
label` lines and is taken as it is. The videos that the annotation file of a data set names (`annotations.py`) are
looked for in the folder, at any depth.
"""

import dataclasses
import hashlib
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.data.annotations import Annotation, read_annotations
from pretrain.data.class_names import matches_name, read_classes, read_lines
from pretrain.data.label_lists import classes_of_labels, numbers_of_classes, read_label_lists
from pretrain.data.segments import Segment
from pretrain.errors import Refused

VIDEO_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov"),
    *(".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
MAX_CLASSES = 100_000
"""Above this an integer in a list file is taken for a mistake, not for a class."""
MAX_KEY_NAME = 48
"""Characters of a key that come from the path; with hash, segment and suffix a tar header's 100 must hold it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A video to pack, or a segment of one.

    Attributes:
        path: Its path relative to the root (as listed, if it lies elsewhere).
        label: Its class number, or its class numbers, ascending, where each video has any number; None if unlabelled.
        segment: What to cut out of it; None for all of it.
        splits: The splits of the data set that it is in, if several are packed.
    """

    path: str
    label: int | tuple[int, ...] | None = None
    segment: Segment | None = None
    splits: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The key of its sample: that of its path, and the segment in milliseconds if it is one."""
        segment = "" if self.segment is None else f"-{self.segment.start_ms:09d}-{self.segment.end_ms:09d}"
        return key_of(self.path) + segment


@dataclasses.dataclass(frozen=True)
class Sources:
    """The videos to pack, sorted by path.

    Attributes:
        root: The folder that the paths are relative to.
        videos: The videos.
        classes: The names of the classes; empty if unlabelled.
        ignored: How many other files the folder holds.
        outside: A video that lies in no class folder, for which the others that do have no labels either.
        multi_label: Whether each video has any number of labels instead of one.
    """

    root: Path
    videos: tuple[Source, ...]
    classes: tuple[str, ...]
    ignored: int = 0
    outside: str | None = None
    multi_label: bool = False


def find_sources(
    folder: str | Path | None,
    list_file: str | Path | None = None,
    classes: str | None = None,
    unlabelled: bool = False,
    annotations: str | Path | None = None,
    split: str | None = None,
    multi_label: bool = False,
) -> Sources:
    """Finds the videos to pack.

    Args:
        folder: The folder of videos or of class folders; with a list file, what its paths are relative to (None: the
            folder of the list file).
        list_file: A file of `path label` lines; the label is the last field, an integer or a name.
        classes: What `read_classes` takes; None takes them from the input.
        unlabelled: Whether to pack without labels; a list file then holds paths, and labels after them are dropped.
        annotations: The annotation file of a data set whose videos lie in the folder.
        split: Which split of the annotation file, or `all` of them.
        multi_label: Whether the list file gives each video any number of labels; see `label_lists.py`.

    Raises:
        Refused: An input is missing, empty or unreadable, a line has no label, a label is no class, a path is repeated,
            the folder holds none of the videos that the annotation file names.
    """
    names = read_classes(classes) if classes is not None else None
    if folder is not None and not os.path.isdir(folder):
        raise Refused(f"{folder}: no such folder; name a folder of videos")
    if multi_label and list_file is None:
        raise Refused(
            "multi_label: needs a list of `path label;label` lines, or a CSV file of them; name it with --list"
        )
    if list_file is not None:
        root = Path(folder) if folder is not None else Path(list_file).parent
        if multi_label:
            return _from_label_lists(Path(list_file), root, names)
        return _from_list(Path(list_file), root, names, unlabelled)
    if annotations is not None and folder is not None:
        return _from_annotations(Path(annotations), Path(folder), split, names, unlabelled)
    if folder is None:
        raise Refused("source: nothing to pack; name a folder of videos, or a list file with --list")
    return _from_folder(Path(folder), names, unlabelled)


def parse_list(lines: Sequence[str], name: str) -> list[tuple[int, str, str]]:
    """Returns the line number, path and label of each line that is not blank.

    Args:
        lines: The lines of a list file.
        name: The file's name, for the message.

    Raises:
        Refused: A line has no label.
    """
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().replace("\t", " ").rpartition(" ")
        if not path.strip() or Path(label).suffix.lower() in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES):
            raise Refused(
                f"{name}:{number}: no label in {line.strip()!r}; write `path label`, or pack with --unlabelled true"
            )
        entries.append((number, path.strip(), label))
    return entries


def key_of(path: str) -> str:
    """Returns the key of a path: the readable end of it and a hash, in letters, digits, - and _ only.

    It is a function of the path alone, so a video keeps its key from set to set; 64 bits of SHA-256 keep keys apart.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "_", posixpath.splitext(path)[0]).strip("_")[-MAX_KEY_NAME:]
    return f"{name or 'video'}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"


def _from_folder(folder: Path, names: tuple[str, ...] | None, unlabelled: bool) -> Sources:
    files = list(_files_below(folder))
    paths = _with_suffix(files, VIDEO_SUFFIXES) or _with_suffix(files, IMAGE_SUFFIXES)
    ignored = len(files) - len(paths)
    if not paths:
        other = f" (only {ignored} other files)" if ignored else ""
        known = " ".join(suffix[1:] for suffix in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES))
        raise Refused(f"{folder}: holds no video and no image{other}; they are known by their suffix: {known}")
    outside = [path for path in paths if "/" not in path]
    if unlabelled or outside:
        if names is not None:
            raise Refused(f"classes: given, but the videos of {folder} are not in class folders; drop it or use --list")
        mixed = not unlabelled and len(outside) < len(paths)
        return Sources(folder, tuple(map(Source, paths)), (), ignored, outside[0] if mixed else None)
    owners = [path.split("/", 1)[0] for path in paths]
    classes = names if names is not None else tuple(sorted(set(owners)))
    numbers = {name: number for number, name in enumerate(classes)}
    strange = next((owner for owner in owners if owner not in numbers), None)
    if strange is not None:
        raise Refused(f"{folder / strange}: the folder is none of the classes given; add {strange!r} to --classes")
    labelled = tuple(Source(path, numbers[owner]) for path, owner in zip(paths, owners, strict=True))
    return Sources(folder, labelled, classes, ignored)


def _with_suffix(files: Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    """The files with one of the suffixes that are not hidden, sorted."""
    return sorted(
        path for path in files if path.lower().endswith(suffixes) and not posixpath.basename(path).startswith(".")
    )


def _files_below(folder: Path) -> Iterator[str]:
    """Yields the path of each file, relative and with forward slashes; follows links, but enters no folder twice."""

    def refuse(error: OSError) -> None:
        raise Refused(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")

    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(parent, folder)
        yield from (name if relative == "." else f"{relative}/{name}" for name in files)


def _from_list(list_file: Path, root: Path, names: tuple[str, ...] | None, unlabelled: bool) -> Sources:
    lines = read_lines(list_file)
    if unlabelled:
        entries = [(number, _path_of(line.strip(), root), "") for number, line in enumerate(lines, 1) if line.strip()]
    else:
        entries = parse_list(lines, str(list_file))
    if not entries:
        raise Refused(f"{list_file}: empty; write one `path label` a line")
    entries = [(number, _relative(path, root), label) for number, path, label in entries]
    first_lines: dict[str, int] = {}
    for number, path, _ in entries:
        if path in first_lines:
            raise Refused(
                f"{list_file}:{number}: {path} stands on line {first_lines[path]} already; remove one of them"
            )
        first_lines[path] = number
    if unlabelled:
        return Sources(root, tuple(Source(path) for path in sorted(first_lines)), ())
    classes = names if names is not None else _classes_of(list_file, entries)
    numbers = {str(number): number for number in range(len(classes))}
    numbers |= {name: number for number, name in enumerate(classes)}
    for number, _, label in entries:
        if label not in numbers:
            raise Refused(
                f"{list_file}:{number}: label {label!r} is none of the {len(classes)} classes; "
                f"write a class name or a number from 0 to {len(classes) - 1}"
            )
    return Sources(
        root, tuple(Source(path, numbers[label]) for _, path, label in sorted(entries, key=_by_path)), classes
    )


def _from_label_lists(list_file: Path, root: Path, names: tuple[str, ...] | None) -> Sources:
    entries = read_label_lists(list_file)
    classes = names if names is not None else classes_of_labels([one for _, _, labels in entries for one in labels])
    numbers = numbers_of_classes(classes)
    videos: dict[str, Source] = {}
    for place, path, labels in entries:
        strange = next((label for label in labels if label not in numbers), None)
        if strange is not None:
            raise Refused(f"{place}: label {strange!r} is none of the {len(classes)} classes; correct it or --classes")
        path = _relative(path, root)
        if path in videos:
            raise Refused(f"{place}: {path} stands on a line before already; write all of its labels on one line")
        videos[path] = Source(path, tuple(sorted({numbers[label] for label in labels})))
    return Sources(root, tuple(videos[path] for path in sorted(videos)), classes, multi_label=True)


def _from_annotations(
    file: Path, folder: Path, split: str | None, names: tuple[str, ...] | None, unlabelled: bool
) -> Sources:
    annotations = read_annotations(file, split)
    classes: tuple[str, ...] = ()
    if not unlabelled:
        bare = next((entry for entry in annotations.entries if entry.label is None), None)
        if bare is not None:
            raise Refused(f"{bare.place}: has no label; name a file that gives labels, or pack with --unlabelled true")
        classes = names if names is not None else annotations.ordered_classes()
    numbers = {name: number for number, name in enumerate(classes)}
    videos = _VideosByName(folder)
    places: dict[Source, str] = {}
    labels: dict[Source, int | None] = {}
    splits: dict[Source, tuple[str, ...]] = {}
    for entry in annotations.entries:
        if not unlabelled and entry.label not in numbers:
            raise Refused(f"{entry.place}: {entry.label!r} is none of the {len(classes)} classes; correct --classes")
        label = None if unlabelled else numbers[str(entry.label)]
        video = videos.find(entry)
        if labels.setdefault(video, label) != label:
            raise Refused(
                f"{entry.place}: {video.path} has another label at {places[video]} already; remove one of them"
            )
        places.setdefault(video, entry.place)
        splits[video] = splits.get(video, ()) + ((entry.split,) if entry.split else ())
    if not videos.found:
        example = annotations.entries[0].files[0][0]
        raise Refused(
            f"{folder}: holds none of the {len(annotations.entries)} videos that {file} lists, such as {example}; name "
            "the folder of the data set's videos"
        )
    labelled = [
        dataclasses.replace(video, label=label, splits=tuple(dict.fromkeys(splits[video])))
        for video, label in labels.items()
    ]
    return Sources(folder, tuple(sorted(labelled, key=_by_path_and_segment)), classes)


class _VideosByName:
    """The videos of a folder, to be found by the names that annotation files give them."""

    def __init__(self, folder: Path) -> None:
        self.found = 0
        self.paths: dict[str, list[str]] = {}
        for path in _with_suffix(list(_files_below(folder)), VIDEO_SUFFIXES):
            self.paths.setdefault(_stem(path), []).append(path)

    def find(self, entry: Annotation) -> Source:
        """Returns the video of an entry, without its label.

        Of several files of the name it is the one in the folder of the class, or else the first. What is not there
        keeps the name that it should have, and is rejected for it when it cannot be opened.
        """
        for name, segment in entry.files:
            paths = self.paths.get(_stem(name), [])
            if paths:
                self.found += 1
                of_class = (
                    path
                    for path in paths
                    if matches_name(posixpath.basename(posixpath.dirname(path)), str(entry.label))
                )
                return Source(next(of_class, paths[0]), None, segment)
        return Source(*entry.files[0][:1])


def _by_path_and_segment(video: Source) -> tuple[str, Segment]:
    return video.path, video.segment or Segment(0, 0)


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


def _classes_of(list_file: Path, entries: Sequence[tuple[int, str, str]]) -> tuple[str, ...]:
    """Class names from the labels: 0 .. the highest if all are integers, else the names, sorted."""
    integers = [(number, int(label)) for number, _, label in entries if re.fullmatch(r"[+-]?[0-9]{1,18}", label)]
    if len(integers) < len(entries):
        return tuple(sorted({label for _, _, label in entries}))
    for number, label in integers:
        if not 0 <= label < MAX_CLASSES:
            raise Refused(f"{list_file}:{number}: label {label} is no class number; number the classes from 0")
    return tuple(str(number) for number in range(max(label for _, label in integers) + 1))


def _by_path(entry: tuple[int, str, str]) -> str:
    return entry[1]


def _path_of(line: str, root: Path) -> str:
    """The path in a line of which it is not known whether a label follows."""
    path, _, _ = line.rpartition(" ")
    return path.strip() if path and not os.path.exists(root / line) and os.path.exists(root / path.strip()) else line


def _relative(path: str, root: Path) -> str:
    """The path as shards name it: relative to the root where it lies below it."""
    path = posixpath.normpath(path)
    prefix = posixpath.normpath(root.absolute().as_posix()) + "/"
    return path.removeprefix(prefix)
