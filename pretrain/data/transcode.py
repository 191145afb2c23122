"""From any video file to the one form that shards store: H.264 at a constant frame rate with closed GOPs.

Decoders agree frame for frame on such files and disagree on much of what cameras and websites make (variable frame
rates, open GOPs, edit lists, rotation flags), so packing, and prediction on a user's own file, normalise here once.
Here the input is read past its damage, cut to a segment if one is asked for, and put on a constant clock;
`mp4_encoder.py` makes the output. A still image is a video of one frame. Not done at all: tone mapping of HDR,
deinterlacing, mirroring, blending transparent pictures.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pretrain.data.mp4_encoder import Mp4Encoder, Transcoded, quarter_turn
from pretrain.data.segments import Segment
from pretrain.errors import BadSample

LEAST_DECODED = Fraction(9, 10)
"""Share of its frames that a file must give; below it the file counts as truncated or damaged."""
MAX_GAP_S = 60
"""Longest time one frame may stay on screen; above it the timestamps count as broken."""
RATE_RANGE = (Fraction(1, 10), Fraction(240))
"""Frame rates, in frames per second, that a container is believed to mean."""
FALLBACK_RATE = Fraction(25)
"""Frame rate, in frames per second, of a file that names none within `RATE_RANGE`."""
LEAST_OF_SEGMENT = Fraction(1, 2)
"""Share of its seconds that a segment must give: annotated ones often reach past the end of their video."""
SEEKABLE = {"mov", "matroska"}
"""Containers in which FFmpeg finds a time reliably; others are decoded from their start."""
SEEK_MARGIN_S = 2
"""How much earlier than a segment decoding starts, in seconds, so that no reordered frame is missing."""
LONGEST_S = 7 * 86400
"""Longest video, in seconds, that a container is believed to hold."""
OPEN_OPTIONS = {"pattern_type": "none"}
"""For FFmpeg: the name of an image is a name, also with % in it, and not the pattern of a sequence."""

Frame = TypeVar("Frame")


def transcode(
    source: str | Path,
    *,
    short_side: int = 256,
    gop: int = 16,
    frame_rate: float | None = None,
    segment: Segment | None = None,
    decoder_threads: int = 1,
    on_progress: Callable[[], object] = lambda: None,
) -> Transcoded:
    """Transcodes a video file to the form that shards store, in memory.

    Args:
        source: The file, a video or an image.
        short_side: Largest short side in pixels; a smaller video keeps its size, rounded down to even numbers.
        gop: Frames from one keyframe to the next.
        frame_rate: Frames per second of the output; None keeps the average rate of the input.
        segment: What to cut out of it; None for all of it.
        decoder_threads: Threads that decode the input (0: one per core); the output is the same.
        on_progress: Called after every packet read, so that a watchdog sees progress.

    Returns:
        The transcoded video.

    Raises:
        BadSample: The file holds no video that can be decoded, or less than nine tenths of the frames that it promises,
            or less than half of the segment. The message is the reason alone, without the file's name.
    """
    try:
        with _opened(source) as container:
            stream = video_stream(container)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = decoder_threads
            return _transcode_stream(container, stream, short_side, gop, frame_rate, segment, on_progress)
    except av.FFmpegError as error:
        raise BadSample(reason_of(error)) from error


def duration_of(source: str | Path, on_progress: Callable[[], object] = lambda: None) -> Fraction | None:
    """Returns the length of a video file in seconds, as its container states it or its packets tell; None if neither.

    Args:
        source: The file.
        on_progress: Called after every packet read, so that a watchdog sees progress.

    Raises:
        BadSample: The file cannot be opened or holds no video. The message is the reason alone.
    """
    try:
        with _opened(source) as container:
            stream = video_stream(container)
            stated_s = Fraction(_tagged_duration_s(stream)).limit_denominator(1000)
            if not stated_s and stream.duration and stream.time_base is not None:
                stated_s = stream.duration * stream.time_base
            if not stated_s:
                stated_s = Fraction(container.duration or 0, av.time_base)
            if stated_s <= 0:
                stated_s = _end_of_packets_s(container, stream, on_progress)
            return stated_s if 0 < stated_s <= LONGEST_S else None
    except av.FFmpegError as error:
        raise BadSample(reason_of(error)) from error


def at_constant_rate(
    frames: Iterable[tuple[Fraction, Fraction, Frame]], rate: Fraction, look_ahead_s: Fraction
) -> Iterator[Frame]:
    """Yields the frame on screen at each tick of a constant rate, repeating and dropping frames as needed.

    Tick k shows the last frame that starts before k / rate + look_ahead_s; the look-ahead absorbs the rounding of
    timestamps.

    Args:
        frames: Start and duration in seconds of each frame, starts not decreasing, and the frame. Of those that start
            before zero the last is on screen at tick 0.
        rate: Ticks per second.
        look_ahead_s: Seconds, more than 0 and at most half a tick.
    """
    tick, end_s, shown = 0, Fraction(0), None
    for start_s, duration_s, frame in frames:
        while shown is not None and tick / rate + look_ahead_s <= start_s:
            yield shown
            tick += 1
        shown, end_s = frame, start_s + duration_s
    if shown is not None:
        for _ in range(tick, max(1, math.floor(end_s * rate + Fraction(1, 2)))):
            yield shown


def rounded_rate(rate: Fraction) -> Fraction:
    """Returns the whole or NTSC (n * 1000 / 1001) frame rate within 0.04 %, or else the rate as a simple fraction."""
    candidates = (Fraction(round(rate)), Fraction(round(rate * 1001 / 1000)) * 1000 / 1001)
    nearest = min(candidates, key=lambda candidate: abs(candidate - rate))
    return nearest if abs(nearest - rate) <= rate / 2500 else rate.limit_denominator(1001)


def fitted_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Returns the even width and height, in pixels, that bring the short side down to `short_side`, never up."""
    scale = min(Fraction(1), Fraction(short_side, min(width, height)))
    return max(2, int(width * scale) // 2 * 2), max(2, int(height * scale) // 2 * 2)


def _opened(source: str | Path) -> InputContainer:
    # Absolute: FFmpeg takes what stands before a colon at the start of a name for a protocol.
    return av.open(os.path.abspath(source), metadata_errors="ignore", options=OPEN_OPTIONS)


def _transcode_stream(
    container: InputContainer,
    stream: VideoStream,
    short_side: int,
    gop: int,
    frame_rate: float | None,
    segment: Segment | None,
    on_progress: Callable[[], object],
) -> Transcoded:
    stored_rate = _stored_rate(stream)
    rate = Fraction(frame_rate).limit_denominator(1001) if frame_rate is not None else rounded_rate(stored_rate)
    if _is_image(container):
        stored_rate = rate
    decoder = _Decoder(container, stream, stored_rate, segment, on_progress)
    encoder = None
    for frame in at_constant_rate(decoder.frames(), rate, 1 / max(rate, stored_rate) / 2):
        if encoder is None:
            encoder = Mp4Encoder(fitted_size(*_display_size(frame, stream), short_side), rate, gop)
        encoder.write(frame)
    decoder.check()
    if encoder is None:
        raise BadSample("no frame in it")
    return encoder.finish()


class _Decoder:
    """Decodes a stream, or a segment of it, past its damaged packets, and keeps count of them."""

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        rate: Fraction,
        segment: Segment | None,
        on_progress: Callable[[], object],
    ) -> None:
        self.container, self.stream, self.rate, self.on_progress = container, stream, rate, on_progress
        self.segment = segment
        self.packets = self.failed = self.decoded = 0
        self.first_s: Fraction | None = None
        self.end_s = Fraction(0)
        self.error: av.FFmpegError | None = None

    def frames(self) -> Iterator[tuple[Fraction, Fraction, VideoFrame]]:
        """Yields start and duration in seconds of each frame that decodes, and the frame.

        The start is counted from the first frame of the file, or from the start of the segment: then it is negative for
        frames before it, and the frame after it stands at its end, so that the one before lasts until there.
        """
        origin_s = Fraction(0) if self.segment is None else self.segment.start_s
        last_s = None if self.segment is None else self.segment.end_s
        for start_s, duration_s, frame in self._timed(self._seek()):
            if last_s is not None:
                start_s = min(start_s, last_s)
                duration_s = min(duration_s, last_s - start_s)
            self.first_s = start_s if self.first_s is None else self.first_s
            self.end_s = start_s + duration_s
            yield start_s - origin_s, duration_s, frame
            if start_s == last_s:
                return

    def _seek(self) -> Fraction | None:
        """Goes to a little before the segment; returns the file's time zero in seconds, None for its first frame."""
        formats = set(self.container.format.name.split(","))
        time_base = self.stream.time_base
        if self.segment is None or self.segment.start_s <= SEEK_MARGIN_S or not formats & SEEKABLE or time_base is None:
            return None
        zero_s = (self.stream.start_time or 0) * time_base
        target_s = zero_s + self.segment.start_s - SEEK_MARGIN_S
        with contextlib.suppress(av.FFmpegError):  # then it is decoded from its start
            self.container.seek(math.floor(target_s / time_base), stream=self.stream)
        return zero_s

    def _timed(self, zero_s: Fraction | None) -> Iterator[tuple[Fraction, Fraction, VideoFrame]]:
        """Yields start, counted from `zero_s`, and duration in seconds, and each frame that decodes."""
        # An AVI file has a rate but no timestamps: those that FFmpeg gives are guesses, and wrong after B-frames. An
        # image has neither.
        timed = "avi" not in self.container.format.name.split(",") and not _is_image(self.container)
        start_s: Fraction | None = None
        for frame in self._decoded():
            previous_s = start_s
            start_s = Fraction(0) if previous_s is None else previous_s + 1 / self.rate
            if timed and frame.pts is not None and frame.time_base is not None:
                time_s = frame.pts * frame.time_base
                zero_s = time_s if zero_s is None else zero_s
                start_s = max(time_s - zero_s, previous_s or Fraction(0))
            if previous_s is not None and start_s - previous_s > MAX_GAP_S:
                raise BadSample(f"its timestamps jump by {float(start_s - previous_s):.0f} s at frame {self.decoded}")
            duration_s = 1 / self.rate
            if timed and frame.duration and frame.time_base is not None:
                duration_s = min(frame.duration * frame.time_base, Fraction(MAX_GAP_S))
            yield start_s, duration_s, frame

    def _decoded(self) -> Iterator[VideoFrame]:
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.FFmpegError as error:
                self.error = error
                return
            self.on_progress()
            self.packets += packet.size > 0
            try:
                decoded = packet.decode()
            except av.FFmpegError as error:
                self.failed += packet.size > 0
                self.error = error
                continue
            self.decoded += len(decoded)
            yield from decoded

    def check(self) -> None:
        """Raises BadSample if too little of the stream came through."""
        promised = self.packets if self.segment is not None else max(self.packets, self.stream.frames)
        if self.decoded == 0:
            why = f": damaged or encrypted ({reason_of(self.error)})" if self.error else ""
            raise BadSample(f"none of its {promised} frames can be decoded{why}" if promised else "no frame in it")
        good = self.packets - self.failed
        if good < LEAST_DECODED * promised:
            raise BadSample(f"only {good} of its {promised} frames can be decoded: truncated or damaged")
        if self.segment is not None:
            present_s = self.end_s - max(self.first_s or Fraction(0), self.segment.start_s)
            if present_s < LEAST_OF_SEGMENT * (self.segment.end_s - self.segment.start_s):
                raise BadSample(f"ends after {float(self.end_s):.1f} s, with less than half of the segment to cut out")
            return
        promised_s = _tagged_duration_s(self.stream)
        if self.end_s < LEAST_DECODED * promised_s:
            raise BadSample(f"ends after {float(self.end_s):.1f} of its {promised_s:.1f} s: truncated or damaged")


def video_stream(container: InputContainer) -> VideoStream:
    """Returns the stream that a player would show; raises `BadSample` if there is none or its codec is unknown."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        raise BadSample("holds no video stream")
    if stream.disposition & Disposition.attached_pic:
        raise BadSample("holds no video stream, only a cover picture")
    if stream.codec_context is None:
        raise BadSample("its codec is unknown to FFmpeg")
    return stream


def _is_image(container: InputContainer) -> bool:
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def _end_of_packets_s(container: InputContainer, stream: VideoStream, on_progress: Callable[[], object]) -> Fraction:
    """How long the packets of a stream last, in seconds; 0 if they tell no time."""
    first = last = None
    for packet in container.demux(stream):
        on_progress()
        if packet.pts is not None:
            first = packet.pts if first is None else min(first, packet.pts)
            last = max(last or 0, packet.pts + (packet.duration or 0))
    if first is None or last is None or stream.time_base is None:
        return Fraction(0)
    return (last - first) * stream.time_base


def _stored_rate(stream: VideoStream) -> Fraction:
    low, high = RATE_RANGE
    rates = (stream.average_rate, stream.guessed_rate)
    return next((rate for rate in rates if rate is not None and low <= rate <= high), FALLBACK_RATE)


def _display_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """Upright width and height in pixels once the pixels are square."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width = round(frame.width * aspect) if Fraction(1, 4) <= aspect <= 4 else frame.width
    return (frame.height, width) if quarter_turn(frame) in (90, -90) else (width, frame.height)


def _tagged_duration_s(stream: VideoStream) -> float:
    """The length in seconds that a Matroska or WebM file states for this stream; 0 if it states none."""
    try:
        hours, minutes, seconds = stream.metadata.get("DURATION", "0:0:0").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0


def reason_of(error: av.FFmpegError) -> str:
    """Returns one line of what FFmpeg says, with the last line of its log where it left one."""
    detail = str(error.log[-1]).strip() if error.log else ""
    text = f"{error.strerror} ({detail})" if detail else str(error.strerror)
    return " ".join(text.split())
