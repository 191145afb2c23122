"""Reads frames by their number with PyAV, exactly: frame i is the i-th one that a player shows, in any file.

The numbers come from the timestamps of the packets, which are read without decoding; frames are decoded from the
keyframe before them on. A file whose packets tell no order (AVI, raw streams, a start in the middle of a group of
pictures) is decoded from its start instead, and its frames are counted. Frames are turned upright as the file asks,
and not mirrored.
"""

import bisect
import io
import itertools
from collections.abc import Iterator

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter

from pretrain.data.mp4_encoder import quarter_turn
from pretrain.data.transcode import reason_of, video_stream
from pretrain.data.video import Allocate, new_array
from pretrain.errors import BadSample

NO_TIMESTAMPS = 0x80  # AVFMT_NOTIMESTAMPS
UNTIMED = "avi"
"""A format without timestamps that does not say so: those that FFmpeg gives are guesses, and wrong after B-frames."""


class PyAvReader:
    """Reads with PyAV, one thread: the loader's workers are the parallelism."""

    def __init__(self, video: bytes) -> None:
        """Opens a video from its bytes and reads its packets; raises `BadSample` if PyAV cannot."""
        try:
            # Closed at once: an open container is part of a cycle that keeps the video until the collector comes.
            with av.open(io.BytesIO(video), "r", metadata_errors="ignore") as container:
                stream = video_stream(container)
                self._decoder = stream.codec_context
                self._decoder.thread_type, self._decoder.thread_count = "NONE", 1
                self._packets = [packet for packet in container.demux(stream) if packet.size]
                self._ordered = _tell_order(container, self._packets)
            self._colours = VideoReformatter()
            if self._ordered:
                self._times = sorted(_time(packet) for packet in self._packets if not packet.is_discard)
                keys = ((_time(packet), number) for number, packet in enumerate(self._packets) if packet.is_keyframe)
                self._key_times, self._key_packets = zip(*sorted(keys), strict=True)
                self._frames = len(self._times)
            else:
                self._frames = sum(1 for _ in self._decoded_from(0))
        except av.FFmpegError as error:
            raise BadSample(f"PyAV cannot open it: {reason_of(error)}") from None
        except BadSample as error:
            raise BadSample(f"PyAV cannot open it: {error}") from None

    def __len__(self) -> int:
        """Frames in the video."""
        return self._frames

    def read(self, indices: np.ndarray, allocate: Allocate = new_array) -> np.ndarray:
        """Reads frames, as `VideoReader` says."""
        unique, inverse = np.unique(indices, return_inverse=True)
        numbers = unique.tolist()
        try:
            pictures = self._pictures(numbers)
        except av.FFmpegError as error:
            raise BadSample(f"PyAV cannot decode frames {numbers[0]} to {numbers[-1]}: {reason_of(error)}") from None
        if len(pictures) < len(numbers):
            raise BadSample(f"PyAV cannot decode frames {numbers[0]} to {numbers[-1]}: damaged, or past the last frame")
        if len({picture.shape for picture in pictures}) > 1:
            raise BadSample(f"its frames {numbers[0]} to {numbers[-1]} are of different sizes")
        frames = allocate((len(indices), *pictures[0].shape))
        for place, number in enumerate(inverse):
            frames[place] = pictures[number]
        return frames

    def _pictures(self, numbers: list[int]) -> list[np.ndarray]:
        """The frames of these ascending numbers, but for those that do not come out of the decoder whole."""
        if not self._ordered:
            wanted_numbers = set(numbers)
            counted = enumerate(itertools.islice(self._decoded_from(0), numbers[-1] + 1))
            return [self._picture(frame) for number, frame in counted if number in wanted_numbers]
        times = [self._times[number] for number in numbers if number < self._frames]
        pictures: list[np.ndarray] = []
        for key, group in itertools.groupby(times, self._keyframe_before):
            wanted = list(group)
            found = self._pictures_at(wanted, key)
            if len(found) < len(wanted) and key:
                found = self._pictures_at(wanted, 0)
            pictures += found
        return pictures

    def _keyframe_before(self, time: int) -> int:
        """The number, among the keyframes, of the last one that is shown no later than `time`."""
        return bisect.bisect_right(self._key_times, time) - 1

    def _pictures_at(self, times: list[int], key: int) -> list[np.ndarray]:
        """The frames at these times, decoded from a keyframe on; none if it is no picture of its own."""
        missing = set(times)
        found: dict[int, np.ndarray] = {}
        begun = key == 0
        for frame in self._decoded_from(self._key_packets[key]):
            if frame.pts is None or frame.is_corrupt:
                continue
            if not begun and frame.pts >= self._key_times[key]:
                begun = True
                if frame.pict_type != PictureType.I:  # gradual refresh: later frames may still show what is missing
                    break
            if frame.pts in missing:
                missing.remove(frame.pts)
                found[frame.pts] = self._picture(frame)
                if not missing:
                    break
        return [found[time] for time in times if time in found]

    def _decoded_from(self, first: int) -> Iterator[VideoFrame]:
        if self._decoder.is_open:
            self._decoder.flush_buffers()
        for packet in self._packets[first:]:
            yield from self._decoder.decode(packet)
        yield from self._decoder.decode(None)

    def _picture(self, frame: VideoFrame) -> np.ndarray:
        picture = self._colours.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return np.rot90(picture, quarter_turn(frame) // 90)


def _tell_order(container: InputContainer, packets: list[Packet]) -> bool:
    """Whether the times of the packets tell which frame is which, and decoding can start with the first of them."""
    if UNTIMED in container.format.name or container.format.flags & NO_TIMESTAMPS:
        return False
    times = [packet.pts for packet in packets if packet.pts is not None]
    return len(set(times)) == len(packets) > 0 and packets[0].is_keyframe and packets[0].pts == min(times)


def _time(packet: Packet) -> int:
    assert packet.pts is not None, "packets that tell the order of frames have times"
    return packet.pts
