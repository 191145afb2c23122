"""Cuts long videos into segments, each a sample of its own, before the plan of a pack is made.

Only the lengths are read here, from the containers' headers, in the processes that transcode later.
"""

import dataclasses

from pretrain.data.pack_worker import DurationTask, duration_task
from pretrain.data.pool import Died, WorkerPool
from pretrain.data.segments import Segment, consecutive_segments
from pretrain.data.sources import Source, Sources


def cut_into_segments(sources: Sources, segment_s: float, jobs: int, stall_s: float) -> Sources:
    """Replaces each video that is longer than `segment_s` seconds by its consecutive segments.

    A segment that an annotation file asks for is cut further. A video whose length cannot be told stays whole: if it
    cannot be decoded either, packing gives the reason.

    Args:
        sources: The videos.
        segment_s: The longest segment in seconds.
        jobs: Processes that read lengths.
        stall_s: Seconds without progress after which the length of a video is given up.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    unmeasured = [video for video in sources.videos if video.segment is None]
    lengths: dict[Source, Segment] = {}
    with WorkerPool(duration_task, jobs) as pool:
        tasks = (DurationTask(sources.root / video.path, stall_s) for video in unmeasured)
        for video, duration_s in zip(unmeasured, pool.map(tasks), strict=True):
            if not isinstance(duration_s, Died) and duration_s is not None:
                lengths[video] = Segment(0, round(duration_s * 1000))
    videos = [part for video in sources.videos for part in _parts(video, lengths.get(video), round(segment_s * 1000))]
    return dataclasses.replace(sources, videos=tuple(videos))


def _parts(video: Source, length: Segment | None, longest_ms: int) -> list[Source]:
    whole = video.segment or length
    if whole is None or whole.end_ms - whole.start_ms <= longest_ms:
        return [video]
    return [dataclasses.replace(video, segment=segment) for segment in consecutive_segments(whole, longest_ms)]
