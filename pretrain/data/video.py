"""Decoding behind one small interface: a video's bytes in, chosen frames out as uint8, upright.

Shards hold what packing wrote (H.264, constant frame rate, closed GOP, no B-frames), where every decoder agrees on
every frame. On other files decord may return wrong frames, with no error: groups of pictures that lean on the one
before (open GOP: HEVC as x265 writes it, and some H.264 and MPEG-4), AVI and MPEG-TS. PyAV's reader does not
(`pyav_reader.py`), nor, for most of them, torchcodec's (`torchcodec_reader.py`, an extra). Readers must be opened in
the process that uses them: decord may deadlock across a fork.
"""

import io
import itertools
import math
import re
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from pretrain.data.mp4 import read_mp4_video
from pretrain.data.pyav_reader import PyAvReader
from pretrain.data.torchcodec_reader import TorchCodecReader
from pretrain.errors import BadSample

DecoderName = Literal["auto", "decord", "pyav", "torchcodec"]
"""Whose frames are read; auto is decord for files like those that packing writes, and PyAV for all others."""

ALIGNMENT = 32
"""Pixels that decord rounds the width of a row up to."""
PADDED = "from_size == to_size"
"""What decord says when it cannot put frames into a batch since it counts the padding of their rows as pixels."""


class VideoReader(Protocol):
    """An open video."""

    def __len__(self) -> int:
        """Frames in the video."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns `(len(indices), H, W, 3)` uint8 RGB frames; `indices` must ascend and may repeat."""


class DecordReader:
    """Reads with decord (the maintained fork `decord2`), one thread: the loader's workers are the parallelism."""

    def __init__(self, video: bytes) -> None:
        """Opens a video from its bytes; raises `BadSample` if decord cannot."""
        # torch first: decord loads NVIDIA's BLAS for the whole process, and a torch that comes later crashes in it.
        import torch  # noqa: F401, I001
        import decord

        self._decord = decord
        try:
            self._reader = decord.VideoReader(io.BytesIO(video), ctx=decord.cpu(0), num_threads=1)
        except (decord.DECORDError, RuntimeError) as error:
            raise BadSample(f"decord cannot open it: {_first_line(error)}") from None

    def __len__(self) -> int:
        """Frames in the video."""
        return len(self._reader)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns `(len(indices), H, W, 3)` uint8 frames; raises `BadSample` if one cannot be decoded."""
        unique, inverse = np.unique(indices, return_inverse=True)
        try:
            frames = self._decode(unique.tolist())
        except (self._decord.DECORDError, RuntimeError, IndexError, ValueError) as error:
            raise BadSample(f"decord cannot decode frames {unique[0]} to {unique[-1]}: {_first_line(error)}") from None
        return frames if len(unique) == len(indices) else frames[inverse]

    def _decode(self, numbers: list[int]) -> np.ndarray:
        try:
            return self._reader.get_batch(numbers).asnumpy()
        except self._decord.DECORDError as error:
            if PADDED not in str(error):
                raise
        frames: list[np.ndarray] = []
        for before, number in itertools.pairwise([None, *numbers]):
            follows = before is not None and number == before + 1
            frame = self._reader.next() if follows else self._reader[number]  # which seeks, and decodes again
            frames.append(_without_padding(frame.asnumpy()))
        return np.stack(frames)


READERS: dict[str, Callable[[bytes], VideoReader]] = {
    "decord": DecordReader,
    "pyav": PyAvReader,
    "torchcodec": TorchCodecReader,
}


def open_video(video: bytes, decoder: DecoderName = "auto") -> VideoReader:
    """Opens a video from its bytes.

    Args:
        video: The file.
        decoder: Who decodes it.

    Raises:
        BadSample: The decoder cannot open it, or it holds no frame.
        Refused: The decoder is torchcodec, which is not installed or finds no FFmpeg.
    """
    if decoder == "auto":
        decoder = "decord" if decord_is_exact(video) else "pyav"
    reader: VideoReader = READERS[decoder](video)
    if len(reader) == 0:
        raise BadSample("it holds no frames")
    return reader


def decord_is_exact(video: bytes) -> bool:
    """Whether decord is known to return the very frames of a file, as it does for what packing writes.

    Decided by the index of an mp4 file: H.264 without reordered frames, so that none leans on the group of pictures
    before its own, and without an edit list, which decord passes over. Narrow videos whose padded rows decord takes for
    rows of more channels are left out too: `DecordReader` mends them, which takes time.
    """
    found = read_mp4_video(video)
    if found is None or found.codec != "avc1" or not found.in_order or found.edited or not found.width:
        return False
    padded_width = math.ceil(found.width / ALIGNMENT) * ALIGNMENT
    return padded_width == found.width or 3 * padded_width % found.width > 0


def _without_padding(frame: np.ndarray) -> np.ndarray:
    """Mends frames of some narrow videos (24, 48 or 72 pixels wide), whose padding decord counts as more channels."""
    height, width, channels = frame.shape
    return frame.reshape(height, width * channels)[:, : width * 3].reshape(height, width, 3)


def _first_line(error: Exception) -> str:
    """The first line of what decord says, without the time and the lines of decord's own source."""
    lines = [line for line in re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(error)).splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else type(error).__name__
