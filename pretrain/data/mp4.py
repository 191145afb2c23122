"""What the index of an mp4 file says of its video, read from the bytes alone: nothing decoded, and in microseconds.

Boxes and fields are those of the ISO base media file format (ISO/IEC 14496-12).
"""

import struct
from typing import NamedTuple

PATH = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
"""The boxes, each inside the one before, whose content is looked at."""


class Mp4Video(NamedTuple):
    """The video of an mp4 file.

    Attributes:
        codec: Four characters, such as avc1 (H.264) or hvc1 (HEVC).
        width: Stored width in pixels, before any rotation.
        in_order: Whether frames are stored in the order in which they are shown.
        edited: Whether an edit list cuts or delays it.
    """

    codec: str
    width: int
    in_order: bool
    edited: bool


def read_mp4_video(video: bytes) -> Mp4Video | None:
    """Returns what the index of an mp4 file says; None for other files and for several tracks or fragments."""
    boxes: dict[bytes, list[int]] = {}
    try:
        if video[4:8] == b"ftyp":
            _find_boxes(video, 0, len(video), PATH, boxes)
        if [len(boxes.get(kind, [])) for kind in (b"trak", b"vmhd", b"stsd", b"mvex")] != [1, 1, 1, 0]:
            return None
        # The first entry of `stsd` follows its version, flags and count; see VisualSampleEntry.
        codec, width = struct.unpack_from(">4s24xH", video, boxes[b"stsd"][0] + 12)
    except struct.error:
        return None
    return Mp4Video(codec.decode("latin-1"), width, in_order=b"ctts" not in boxes, edited=b"edts" in boxes)


def _find_boxes(video: bytes, start: int, end: int, path: tuple[bytes, ...], found: dict[bytes, list[int]]) -> None:
    """Notes where the content of each box begins, by kind, from `start` to `end` and down the path."""
    while start < end:
        size, kind = struct.unpack_from(">I4s", video, start)
        header = 8
        if size == 1:
            size, header = struct.unpack_from(">Q", video, start + 8)[0], 16
        stop = start + size if size else end
        if stop < start + header:
            return
        found.setdefault(kind, []).append(start + header)
        if path and kind == path[0]:
            _find_boxes(video, start + header, min(stop, end), path[1:], found)
        start = stop
