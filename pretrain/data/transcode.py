"""From any video file to the one form that shards store: H.264 at a constant frame rate with closed GOPs.

Decoders agree frame for frame on such files and disagree on much of what cameras and websites make (variable frame
rates, open GOPs, edit lists, rotation flags), so packing, and prediction on a user's own file, normalise here once.
Here the input is read past its damage and put on a constant clock; `mp4_encoder.py` makes the output. Not done at all:
tone mapping of HDR, deinterlacing, mirroring.
"""

import math
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
from pretrain.errors import BadSample

LEAST_DECODED = Fraction(9, 10)
"""Share of its frames that a file must give; below it the file counts as truncated or damaged."""
MAX_GAP_S = 60
"""Longest time one frame may stay on screen; above it the timestamps count as broken."""
RATE_RANGE = (Fraction(1, 10), Fraction(240))
"""Frame rates, in frames per second, that a container is believed to mean."""
FALLBACK_RATE = Fraction(25)
"""Frame rate, in frames per second, of a file that names none within `RATE_RANGE`."""

Frame = TypeVar("Frame")


def transcode(
    source: str | Path,
    *,
    short_side: int = 256,
    gop: int = 16,
    frame_rate: float | None = None,
    decoder_threads: int = 1,
    on_progress: Callable[[], object] = lambda: None,
) -> Transcoded:
    """Transcodes a video file to the form that shards store, in memory.

    Args:
        source: The file.
        short_side: Largest short side in pixels; a smaller video keeps its size, rounded down to even numbers.
        gop: Frames from one keyframe to the next.
        frame_rate: Frames per second of the output; None keeps the average rate of the input.
        decoder_threads: Threads that decode the input (0: one per core); the output is the same.
        on_progress: Called after every packet read, so that a watchdog sees progress.

    Returns:
        The transcoded video.

    Raises:
        BadSample: The file holds no video that can be decoded, or less than nine tenths of the frames that it promises.
            The message is the reason alone, without the file's name.
    """
    try:
        with av.open(str(source), metadata_errors="ignore") as container:
            stream = video_stream(container)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = decoder_threads
            return _transcode_stream(container, stream, short_side, gop, frame_rate, on_progress)
    except av.FFmpegError as error:
        raise BadSample(reason_of(error)) from error


def at_constant_rate(
    frames: Iterable[tuple[Fraction, Fraction, Frame]], rate: Fraction, look_ahead_s: Fraction
) -> Iterator[Frame]:
    """Yields the frame on screen at each tick of a constant rate, repeating and dropping frames as needed.

    Tick k shows the last frame that starts before k / rate + look_ahead_s; the look-ahead absorbs the rounding of
    timestamps.

    Args:
        frames: Start and duration in seconds of each frame, starts not decreasing from zero, and the frame.
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


def _transcode_stream(
    container: InputContainer,
    stream: VideoStream,
    short_side: int,
    gop: int,
    frame_rate: float | None,
    on_progress: Callable[[], object],
) -> Transcoded:
    stored_rate = _stored_rate(stream)
    rate = Fraction(frame_rate).limit_denominator(1001) if frame_rate is not None else rounded_rate(stored_rate)
    decoder = _Decoder(container, stream, stored_rate, on_progress)
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
    """Decodes a stream past its damaged packets, and keeps count of them."""

    def __init__(
        self, container: InputContainer, stream: VideoStream, rate: Fraction, on_progress: Callable[[], object]
    ) -> None:
        self.container, self.stream, self.rate, self.on_progress = container, stream, rate, on_progress
        self.packets = self.failed = self.decoded = 0
        self.end_s = Fraction(0)
        self.error: av.FFmpegError | None = None

    def frames(self) -> Iterator[tuple[Fraction, Fraction, VideoFrame]]:
        """Yields start and duration in seconds, counted from the first frame, and each frame that decodes."""
        # An AVI file has a rate but no timestamps: those that FFmpeg gives are guesses, and wrong after B-frames.
        timed = "avi" not in self.container.format.name.split(",")
        first_s: Fraction | None = None
        start_s = -1 / self.rate
        for frame in self._decoded():
            previous_s = start_s
            if timed and frame.pts is not None and frame.time_base is not None:
                time_s = frame.pts * frame.time_base
                first_s = time_s if first_s is None else first_s
                start_s = max(time_s - first_s, previous_s, Fraction(0))
            else:
                start_s += 1 / self.rate
            if start_s - previous_s > MAX_GAP_S:
                raise BadSample(f"its timestamps jump by {float(start_s - previous_s):.0f} s at frame {self.decoded}")
            duration_s = 1 / self.rate
            if timed and frame.duration and frame.time_base is not None:
                duration_s = min(frame.duration * frame.time_base, Fraction(MAX_GAP_S))
            self.end_s = start_s + duration_s
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
        promised = max(self.packets, self.stream.frames)
        if self.decoded == 0:
            why = f": damaged or encrypted ({reason_of(self.error)})" if self.error else ""
            raise BadSample(f"none of its {promised} frames can be decoded{why}" if promised else "no frame in it")
        good = self.packets - self.failed
        if good < LEAST_DECODED * promised:
            raise BadSample(f"only {good} of its {promised} frames can be decoded: truncated or damaged")
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
