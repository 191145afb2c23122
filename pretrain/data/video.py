"""Decoding behind one small interface: a video's bytes in, chosen frames out as uint8.

Shards hold what packing wrote (H.264, constant frame rate, closed GOP), where every decoder agrees on every frame.
Readers must be opened in the process that uses them: decord may deadlock across a fork.
"""

import io
import re
from typing import Literal, Protocol

import numpy as np

from pretrain.errors import BadSample

DecoderName = Literal["decord"]

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
        return np.stack([_without_padding(self._reader[number].asnumpy()) for number in numbers])


def open_video(video: bytes, decoder: DecoderName = "decord") -> VideoReader:
    """Opens a video from its bytes.

    Raises:
        BadSample: The decoder cannot open it, or it holds no frame.
    """
    readers = {"decord": DecordReader}
    reader = readers[decoder](video)
    if len(reader) == 0:
        raise BadSample("it holds no frames")
    return reader


def _without_padding(frame: np.ndarray) -> np.ndarray:
    """Mends frames of some narrow videos (48 or 72 pixels wide): decord counts a row's padding as a fourth channel."""
    height, width, channels = frame.shape
    return frame.reshape(height, width * channels)[:, : width * 3].reshape(height, width, 3)


def _first_line(error: Exception) -> str:
    """The first line of what decord says, without the time and the lines of decord's own source."""
    lines = [line for line in re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(error)).splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else type(error).__name__
