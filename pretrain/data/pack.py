"""`tubelet pack`: from a folder of videos to a shard set, in many processes, and on from where it was cut off.

Everything that decides the bytes of a shard is decided before the first video is decoded: which videos (`sources.py`)
and segments of them (`pack_segments.py`), in which order (`pack_plan.py`), and which of them each shard may take. So
neither the number of processes nor an interruption changes a shard, and a shard that is finished is never touched
again. So the parts of a pack on several nodes (`--part`) write the shards that one process would; `pack_merge.py` makes
one set of them. What a folder holds while it is being packed is in README.md.
"""

import contextlib
import dataclasses
import errno
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.data.pack_folder import PackFolder, Rejection, ShardRecord
from pretrain.data.pack_parts import parse_part
from pretrain.data.pack_plan import PackPlan, PlannedShard, make_plan
from pretrain.data.pack_report import PackSummary, show_summary, summary_of_part, summary_of_set
from pretrain.data.pack_segments import cut_into_segments
from pretrain.data.pack_worker import VideoTask, transcode_task
from pretrain.data.pool import Died, ToldToStop, WorkerPool, refuse_pool_options
from pretrain.data.shard_writer import PackedSample, write_shard
from pretrain.data.sources import find_sources
from pretrain.data.terminal import TaskProgress
from pretrain.data.transcode import RATE_RANGE, Transcoded
from pretrain.errors import DiskFull, Interrupted, Preempted, Refused, TubeletError
from pretrain.files import is_out_of_space

SHORTEST_SEGMENT_S = 0.1
LONGEST_SEGMENT_S = 86400
LONGEST_GOP = 100_000
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1)


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """What to pack, from where to where."""

    out: str
    """Folder to write the shards to; an interrupted pack goes on there."""
    source: str | None = None
    """Folder of videos or of class folders (or of images alone); with `list`, what its paths are relative to."""
    list: str | None = None
    """File of `path label` lines to pack instead of all that the folder holds."""
    annotations: str | None = None
    """Official annotations of the videos in `source`: a Kinetics .csv or a Something-Something v2 .json file, a UCF101
    trainlist01.txt, or the folder of split files of UCF101 or HMDB51."""
    split: str | None = None
    """Split of `annotations` to pack: a value of the split column of Kinetics, or train1 to test3 of a folder; `all`
    packs each video once and notes its splits, of which `--data.split` then names one."""
    classes: str | None = None
    """Class names in the order of their numbers: a file with one a line, a labels .json, a folder of shards that has
    them, or names with commas between."""
    unlabelled: bool = False
    """Pack without labels, even from class folders."""
    multi_label: bool = False
    """Each video has any number of labels: `list` holds `path label;label` lines, or is a .csv file whose first column
    is the path and whose others are labels."""
    segment_s: float | None = None
    """Cut videos longer than this many seconds into segments of as many; what is left at the end is a shorter one, or
    is dropped below a quarter."""
    fps: float | None = None
    """Frames per second of the stored videos; by default each video keeps its own rate."""
    gop: int = 16
    """Frames from keyframe to keyframe; fewer seek faster and store larger."""
    short_side: int = 256
    """Largest short side in pixels; smaller videos keep their size."""
    samples_per_shard: int = 256
    """Videos in a shard, before any are rejected."""
    seed: int = 0
    """Chooses the order of the videos, which mixes classes within shards."""
    jobs: int = 0
    """Processes that transcode; 0 is one per core."""
    stall_s: float = 60
    """Seconds without progress after which a video is given up."""
    part: str | None = None
    """I/N: pack one of N parts of the shards only, I from 0 to N - 1, beside the others on any nodes that share `out`
    ($SLURM_ARRAY_TASK_ID/16 in a job array 0-15); `tubelet merge` makes one set of them."""

    def validate(self) -> None:
        """Checks each field by itself, before anything is read or written.

        Raises:
            Refused: A field is out of its range.
        """
        if self.short_side < 16 or self.short_side % 2:
            raise Refused(f"short_side: {self.short_side} does not do; use an even number of pixels, 16 or more")
        low, high = RATE_RANGE
        if self.fps is not None and not low <= self.fps <= high:
            raise Refused(f"fps: {self.fps} does not do; use {float(low):g} to {float(high):g} frames per second")
        if self.segment_s is not None and not SHORTEST_SEGMENT_S <= self.segment_s <= LONGEST_SEGMENT_S:
            raise Refused(
                f"segment_s: {self.segment_s} does not do; use {SHORTEST_SEGMENT_S} to {LONGEST_SEGMENT_S} seconds"
            )
        refuse_pool_options(self.jobs, self.stall_s)
        if self.part is not None:
            parse_part(self.part)
        if self.gop > LONGEST_GOP:
            raise Refused(f"gop: {self.gop} does not do; use 1 to {LONGEST_GOP}")
        for name, least in (("gop", 1), ("samples_per_shard", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise Refused(f"{name}: {getattr(self, name)} does not do; use {least} or more")
        if self.annotations is not None and self.list is not None:
            raise Refused("list, annotations: both name the videos to pack; give one of them")
        if self.annotations is not None and self.source is None:
            raise Refused("source: is missing; name the folder of the videos that the annotations list")
        if self.multi_label and (self.unlabelled or self.annotations is not None):
            other = "unlabelled" if self.unlabelled else "annotations"
            raise Refused(
                f"multi_label, {other}: do not go together; give the labels of a --list, or drop --multi-label"
            )
        if self.split is not None and self.annotations is None:
            raise Refused("split: belongs to --annotations; name an annotation file or drop --split")
        if self.source is not None and Path(self.source).resolve() == Path(self.out).resolve():
            raise Refused(f"out: {self.out} is the folder of the videos; name another folder for the shards")


def pack(config: PackConfig) -> PackSummary:
    """Packs videos into a shard set, or into a part of one, or goes on with a pack that was interrupted.

    Shows progress and a closing table on standard error.

    Raises:
        Refused: Bad options or input; a folder that holds something else or cannot be written; no video that can be
            decoded.
        DiskFull: There is no space left. Here and below, finished shards remain and the same call goes on after them.
        Interrupted: Ctrl-C was pressed.
        Preempted: SIGTERM, SIGUSR1 or SIGUSR2 came while videos were transcoded.
        TubeletError: The disk failed.
    """
    config.validate()
    part = None if config.part is None else parse_part(config.part)
    sources = find_sources(
        config.source,
        config.list,
        config.classes,
        config.unlabelled,
        config.annotations,
        config.split,
        config.multi_label,
    )
    jobs = config.jobs or len(os.sched_getaffinity(0))
    if config.segment_s is not None:
        sources = cut_into_segments(sources, config.segment_s, jobs, config.stall_s)
    plan = make_plan(
        sources,
        short_side=config.short_side,
        gop=config.gop,
        frame_rate=config.fps,
        samples_per_shard=config.samples_per_shard,
        seed=config.seed,
        segment_s=config.segment_s,
    )
    folder = PackFolder(Path(config.out))
    summary = None
    finished_before = folder.check(plan, part)
    if not finished_before:
        shards = plan.shards if part is None else part.share(plan.shards)
        with telling_how_to_go_on(folder, [planned.name for planned in shards]), folder.taking(plan, part):
            finished_before = folder.is_finished()  # by other processes, since it was checked
            if not finished_before:
                before = [folder.record(planned.name) for planned in shards]
                records = _pack_shards(folder, plan, shards, before, jobs, config.stall_s)
                if part is None:
                    folder.finish(plan.settings)
                else:
                    summary = summary_of_part(folder.path, part, len(sources.classes), records, None not in before)
    if summary is None:
        summary = summary_of_set(folder, finished_before)
    summary = dataclasses.replace(summary, ignored=sources.ignored, outside=sources.outside)
    show_summary(summary)
    return summary


def _pack_shards(
    folder: PackFolder,
    plan: PackPlan,
    shards: Sequence[PlannedShard],
    before: Sequence[ShardRecord | None],
    jobs: int,
    stall_s: float,
) -> list[ShardRecord]:
    """Writes the shards that have no record from `before`, each from its own stretch of the stream of results.

    Returns:
        The records of all the shards, in order.
    """
    todo = [planned for planned, record in zip(shards, before, strict=True) if record is None]
    settings = plan.settings
    tasks = (
        VideoTask(
            plan.sources.root / video.path,
            settings["short_side"],
            settings["gop"],
            settings["fps"],
            stall_s,
            video.segment,
        )
        for planned in todo
        for video in planned.videos
    )
    videos, left = (sum(len(planned.videos) for planned in some) for some in (shards, todo))
    with TaskProgress("packing", videos) as progress, WorkerPool(transcode_task, jobs, STOP_SIGNALS) as pool:
        if len(todo) < len(shards):
            progress.resume(videos - left, sum(len(record.rejected) for record in before if record is not None))
        died = f"crashes its decoder, or makes no progress for {stall_s:g} s"
        results = (died if isinstance(result, Died) else result for result in pool.map(tasks))
        records = []
        for planned, record in zip(shards, before, strict=True):
            if record is None:
                rejected: list[Rejection] = []
                entry = write_shard(folder.path / planned.name, _accepted(plan, planned, results, rejected, progress))
                record = ShardRecord(entry, tuple(rejected))
                folder.commit(planned.name, record)
            records.append(record)
        return records


def _accepted(
    plan: PackPlan,
    planned: PlannedShard,
    results: Iterator[Transcoded | str],
    rejected: list[Rejection],
    progress: TaskProgress,
) -> Iterator[PackedSample]:
    """Takes one result for each video of a shard; yields those that can go in, and puts the others on the list.

    Raises:
        OSError: A video that was there when the pack started is gone: not it is bad, but a disk went away.
    """
    for video, result in zip(planned.videos, results, strict=False):
        if isinstance(result, Transcoded):
            yield PackedSample(video.key, video.path, video.label, result, video.segment, video.splits)
        else:
            path = plan.sources.root / video.path
            if video.path not in plan.missing and not os.path.exists(path):
                raise FileNotFoundError(errno.ENOENT, f"{path} is gone; see whether its disk is still mounted")
            segment = "" if video.segment is None else f" (segment {video.segment})"
            rejected.append(Rejection(video.path, result + segment))
        progress.advance(bad=isinstance(result, str))


@contextlib.contextmanager
def telling_how_to_go_on(folder: PackFolder, names: Sequence[str]) -> Iterator[None]:
    """Turns an interruption, or a disk that fails, into one sentence that tells how many of the shards are kept."""
    try:
        yield
    except ToldToStop as error:
        raise Preempted(f"{folder.path}: stopped by {error}; {_how_to_go_on(folder, names)}") from error
    except KeyboardInterrupt as error:
        raise Interrupted(f"{folder.path}: interrupted; {_how_to_go_on(folder, names)}") from error
    except OSError as error:
        if is_out_of_space(error):
            cause = f"no space left on the disk ({error.strerror}); free some"
            raise DiskFull(f"{folder.path}: {cause}; {_how_to_go_on(folder, names)}") from error
        raise TubeletError(f"{folder.path}: {error.strerror or error}; {_how_to_go_on(folder, names)}") from error


def _how_to_go_on(folder: PackFolder, names: Sequence[str]) -> str:
    kept = f"{folder.finished_shards(names)} of {len(names)} shards are finished and stay"
    return f"{kept}; run the same command again to go on"
