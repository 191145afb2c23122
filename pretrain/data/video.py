"""Decoding behind one small interface: a video's bytes in, chosen frames out as uint8, upright.

Shards hold what packing wrote (H.264, constant frame rate, closed GOP, no B-frames), where every decoder agrees on
every frame. On other files decord may return wrong frames, with no error: groups of pictures that lean on the one
before (open GOP: HEVC as x265 writes it, and some H.264 and MPEG-4), AVI and MPEG-TS. PyAV's reader does not
(`pyav_reader.py`), and it is the quicker one, so it is the default; nor, for most of them, does torchcodec's
(`torchcodec_reader.py`, an extra). Readers must be opened in the process that uses them: decord may deadlock across a
fork.
"""

import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from pretrain.errors import BadSample

DecoderName = Literal["auto", "decord", "pyav", "torchcodec"]
"""Who decodes; auto is the one that is exact on every file, and the quickest of those: PyAV."""

Allocate = Callable[[tuple[int, ...]], np.ndarray]
"""Returns a uint8 array of a shape, with anything in it."""


def new_array(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array of its own."""
    return np.empty(shape, np.uint8)


class VideoReader(Protocol):
    """An open video."""

    def __len__(self) -> int:
        """Frames in the video."""

    def read(self, indices: np.ndarray, allocate: Allocate = new_array) -> np.ndarray:
        """Reads frames.

        Args:
            indices: The frames' numbers, ascending; they may repeat.
            allocate: Gives the array that is filled and returned.

        Returns:
            `(len(indices), H, W, 3)` uint8 RGB.

        Raises:
            BadSample: One of them cannot be decoded.
        """


class DecordReader:
    """Reads with decord (the maintained fork `decord2`), one thread: the loader's workers are the parallelism."""

    def __init__(self, video: bytes) -> None:
        """Opens a video from its bytes; raises `BadSample` if decord cannot."""
        self._decord = decord = _import_decord()
        try:
            self._reader = decord.VideoReader(io.BytesIO(video), ctx=decord.cpu(0), num_threads=1)
        except (decord.DECORDError, RuntimeError) as error:
            raise BadSample(f"decord cannot open it: {_first_line(error)}") from None

    def __len__(self) -> int:
        """Frames in the video."""
        return len(self._reader)

    def read(self, indices: np.ndarray, allocate: Allocate = new_array) -> np.ndarray:
        """Reads frames, as `VideoReader` says."""
        try:
            return self._read(indices.tolist(), allocate)
        except (self._decord.DECORDError, RuntimeError, IndexError, ValueError, StopIteration) as error:
            raise BadSample(
                f"decord cannot decode frames {indices[0]} to {indices[-1]}: {_first_line(error)}"
            ) from None

    def _read(self, numbers: list[int], allocate: Allocate) -> np.ndarray:
        """Reads frame by frame, since `get_batch` first copies them all together and then once more."""
        frames = None
        for place, number in enumerate(numbers):
            if frames is not None and number == numbers[place - 1]:
                frames[place] = frames[place - 1]
                continue
            self._reader.seek_accurate(number)
            frame = _without_padding(np.from_dlpack(_InPlace(self._reader.next())))
            if frames is None:
                frames = allocate((len(numbers), *frame.shape))
            frames[place] = frame
        assert frames is not None, "somebody asks for no frames"
        return frames


class _InPlace:
    """An array of decord's on the CPU, for numpy to read where it lies: `asnumpy` copies."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **_: object) -> Any:
        return self.array.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def load_decoder(decoder: DecoderName) -> None:
    """Imports what a decoder needs, which may take longer than to decode a video; raises `Refused` as `open_video`."""
    if _reader_of(decoder) is DecordReader:
        _import_decord()
    elif decoder == "torchcodec":
        from pretrain.data.torchcodec_reader import import_torchcodec

        import_torchcodec()


def _reader_of(decoder: DecoderName) -> Callable[[bytes], VideoReader]:
    """Returns what opens videos with a decoder; imported here, for who reads with one decoder alone starts sooner."""
    if decoder == "decord":
        return DecordReader
    if decoder == "torchcodec":
        from pretrain.data.torchcodec_reader import TorchCodecReader

        return TorchCodecReader
    from pretrain.data.pyav_reader import PyAvReader

    return PyAvReader


def _import_decord() -> Any:
    """Imports decord without NVIDIA's libraries.

    It would load all that are installed for the whole process: 330 MB, and a torch that comes later crashes in them.
    """
    if "decord" not in sys.modules:
        nvidia = sys.modules.get("nvidia")
        sys.modules["nvidia"] = None  # type: ignore[assignment]  # stands for a module that is not installed
        try:
            import decord
        finally:
            del sys.modules["nvidia"]
            if nvidia is not None:
                sys.modules["nvidia"] = nvidia
    import decord

    return decord


def open_video(video: bytes, decoder: DecoderName = "auto") -> VideoReader:
    """Opens a video from its bytes.

    Args:
        video: The file.
        decoder: Who decodes it.

    Raises:
        BadSample: The decoder cannot open it, or it holds no frame.
        Refused: The decoder is torchcodec, which is not installed or finds no FFmpeg.
    """
    reader = _reader_of(decoder)(video)
    if len(reader) == 0:
        raise BadSample("it holds no frames")
    return reader


def read_time_windows(reader: VideoReader, time_windows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Reads several time windows, each frame decoded once.

    Args:
        reader: The video.
        time_windows: Ascending frame numbers of each.

    Returns:
        The frames of each, `(frames, H, W, 3)`; windows that are all the same share their memory.
    """
    first = time_windows[0]
    if all(np.array_equal(other, first) for other in time_windows[1:]):
        return [reader.read(first)] * len(time_windows)
    needed = np.unique(np.concatenate(time_windows))
    frames = reader.read(needed)
    return [frames[np.searchsorted(needed, one)] for one in time_windows]


def _without_padding(frame: np.ndarray) -> np.ndarray:
    """Mends frames of some narrow videos (24, 48 or 72 pixels wide), whose padding decord counts as more channels."""
    height, width, channels = frame.shape
    return frame.reshape(height, width * channels)[:, : width * 3].reshape(height, width, 3)


def _first_line(error: Exception) -> str:
    """The first line of what decord says, without the time and the lines of decord's own source."""
    lines = [line for line in re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(error)).splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else type(error).__name__
