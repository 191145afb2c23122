"""What a process of `tubelet check` does with one tar or one sample. Kept apart from `check.py` to start quickly."""

import contextlib
import dataclasses
import functools
import hashlib
import tarfile
from io import BufferedReader
from pathlib import Path

from pretrain.data.decode_check import DecodeName, decode_video
from pretrain.data.remote import RemoteFolder
from pretrain.data.shard_index import INDEX_NAME, ShardEntry, ShardIndex, key_and_suffix
from pretrain.data.shards import DamagedJson, Sample, ShardSet
from pretrain.data.tar_members import tar_members
from pretrain.errors import BadSample, TubeletError, reason_of_failure

COPY_AGAIN = "restore it from a copy, or make the set again"
MAKE_AGAIN = "make the set again with `tubelet pack` or `tubelet index`"


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong in a set: the file it is in, the key of the sample if it is one's alone, what, and the remedy."""

    file: str
    key: str | None
    reason: str
    remedy: str

    @property
    def subject(self) -> str:
        """The file, and the sample."""
        return self.file if self.key is None else f"{self.file}: sample {self.key}"

    def __str__(self) -> str:
        """The problem as one line."""
        return f"{self.subject}: {' '.join(self.reason.split())}; {self.remedy}"


@dataclasses.dataclass(frozen=True)
class TarTask:
    """A tar to hash and to compare with its index."""

    folder: Path | RemoteFolder
    entry: ShardEntry
    index: ShardIndex


@dataclasses.dataclass(frozen=True)
class SampleTask:
    """A sample to read and decode, by its number in the set; after `stall_s` seconds without progress it is given up.

    `file` and `key` are for those who report it; `size` is the (height, width) in pixels that the index gives.
    """

    folder: Path | RemoteFolder
    number: int
    file: str
    key: str
    size: tuple[int, int] | None
    decode: DecodeName
    stall_s: float


def check_task(task: TarTask | SampleTask) -> list[Problem]:
    """Returns what is wrong with a tar as a whole, or with a sample."""
    file, key = (task.entry.name, None) if isinstance(task, TarTask) else (task.file, task.key)
    try:
        return _tar_problems(task) if isinstance(task, TarTask) else _sample_problems(task)
    except Exception as error:
        return [Problem(file, key, reason_of_failure(error), MAKE_AGAIN)]


def _tar_problems(task: TarTask) -> list[Problem]:
    name, index = task.entry.name, task.index
    try:
        with _open_tar(task.folder, task.entry) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != task.entry.sha256:
                return [Problem(name, None, f"its SHA-256 is not the one in {INDEX_NAME}", COPY_AGAIN)]
            members = _members(file)
    except TubeletError as error:
        return [Problem(name, None, str(error).partition(": ")[2].partition(";")[0], COPY_AGAIN)]
    except OSError as error:
        return [Problem(name, None, f"cannot be read ({error.strerror})", "check its permissions and the disk")]
    problems = []
    for row, key in enumerate(index.keys):
        places = [(index.video_offsets[row], index.video_sizes[row])]
        if index.metadata_sizes[row]:
            places.append((index.metadata_offsets[row], index.metadata_sizes[row]))
        names = (key, key.removeprefix(f"{Path(name).stem}/"))
        if not all(members.get(place) in names for place in places):
            reason = "no video of that key lies in the tar where the index says"
            problems.append(Problem(name, key, reason, COPY_AGAIN))
    return problems


def _open_tar(folder: Path | RemoteFolder, entry: ShardEntry) -> BufferedReader:
    if isinstance(folder, RemoteFolder):
        return open(folder.open_shard(entry)[0], "rb")
    return open(folder / entry.name, "rb")


def _members(file: BufferedReader) -> dict[tuple[int, int], str]:
    """The keys of a tar's members by their offset and size in bytes; as many as can be found if it is damaged."""
    members = {}
    file.seek(0)
    with contextlib.suppress(tarfile.TarError):
        for member in tar_members(file):
            members[member.offset_data, member.size] = key_and_suffix(member.name)[0]
    return members


def _sample_problems(task: SampleTask) -> list[Problem]:
    try:
        sample = _opened(task.folder).read(task.number)
    except DamagedJson as error:
        return [Problem(task.file, task.key, f"its JSON cannot be read ({error.__cause__})", MAKE_AGAIN)]
    except BadSample:
        return [Problem(task.file, task.key, "its checksum differs, so its bytes were changed", COPY_AGAIN)]
    except TubeletError as error:
        return [Problem(task.file, task.key, str(error).partition(": ")[2].partition(";")[0], COPY_AGAIN)]
    try:
        reasons = _differences(sample, task)
    except BadSample as error:
        reasons = [str(error)]
    return [Problem(task.file, task.key, reason, MAKE_AGAIN) for reason in reasons]


def _differences(sample: Sample, task: SampleTask) -> list[str]:
    """Decodes a sample; returns in what it differs from its index, and its JSON from the index."""
    decoded = decode_video(sample.video, task.decode, task.stall_s)
    reasons = []
    if decoded.frames != sample.frames:
        reasons.append(f"holds {decoded.frames} frames where the index says {sample.frames}")
    if decoded.size is not None and task.size not in (None, decoded.size):
        reasons.append(f"its frames are {_shown(decoded.size)} pixels where the index says {_shown(task.size)}")
    names = ("frames", "frame_rate", "height", "width")
    stated = (sample.frames, sample.frame_rate, *(task.size or (None, None)))
    if any(value not in (None, sample.metadata.get(name, value)) for name, value in zip(names, stated, strict=True)):
        reasons.append("its JSON gives other frames, another frame rate or another size than the index")
    return reasons


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


@functools.lru_cache(maxsize=1)
def _opened(folder: Path | RemoteFolder) -> ShardSet:
    return ShardSet.open(folder, check_files=False)
