"""Reads frames by their number with torchcodec, PyTorch's own decoder: an extra, `pip install 'tubelet[torchcodec]'`.

Its wheel holds no FFmpeg: it looks for the libraries of FFmpeg 4 to 9 (libavcodec.so.62 and its like) where the system
keeps them, which PyAV's own copy does not serve, since its files have other names.
"""

import functools
import re
from types import ModuleType

import numpy as np

from pretrain.data.video import Allocate, new_array
from pretrain.errors import BadSample, Refused


class TorchCodecReader:
    """Reads with torchcodec, one thread: the loader's workers are the parallelism."""

    def __init__(self, video: bytes) -> None:
        """Opens a video from its bytes and scans its packets, so that every frame is found by its number.

        Raises:
            BadSample: torchcodec cannot open it.
            Refused: torchcodec is not installed, or does not find FFmpeg.
        """
        decoders = import_torchcodec()
        try:
            self._decoder = decoders.VideoDecoder(
                video, dimension_order="NHWC", num_ffmpeg_threads=1, device="cpu", seek_mode="exact"
            )
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            raise BadSample(f"torchcodec cannot open it: {_reason_of(error)}") from None

    def __len__(self) -> int:
        """Frames in the video."""
        return len(self._decoder)

    def read(self, indices: np.ndarray, allocate: Allocate = new_array) -> np.ndarray:
        """Reads frames, as `VideoReader` says."""
        unique, inverse = np.unique(indices, return_inverse=True)
        try:
            frames = self._decoder.get_frames_at(unique.tolist()).data.numpy()
        except (RuntimeError, ValueError, IndexError) as error:
            numbers = f"frames {unique[0]} to {unique[-1]}"
            raise BadSample(f"torchcodec cannot decode {numbers}: {_reason_of(error)}") from None
        filled = allocate((len(indices), *frames.shape[1:]))
        np.take(frames, inverse, axis=0, out=filled)
        return filled


@functools.cache
def import_torchcodec() -> ModuleType:
    """Imports torchcodec and its FFmpeg, for the whole process; raises `Refused` where either is missing."""
    try:
        import torchcodec.decoders
    except (ImportError, OSError, RuntimeError) as error:
        raise Refused(
            f"data.decoder: torchcodec cannot be imported ({_reason_of(error)}); "
            f"pip install 'tubelet[torchcodec]' in the version that belongs to your torch, or take pyav"
        ) from None
    if torchcodec.ffmpeg_major_version is None:
        raise Refused(
            "data.decoder: torchcodec does not find the libraries of FFmpeg (libavcodec.so.62 or older, and its like); "
            "install FFmpeg (apt install ffmpeg, conda install ffmpeg) or name its folder in LD_LIBRARY_PATH, "
            "or take pyav"
        )
    return torchcodec.decoders


def _reason_of(error: Exception) -> str:
    """The first line of what torchcodec says, without the place in its own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^\w+, \S+:\d+, ", "", lines[0])[:200] if lines else type(error).__name__
