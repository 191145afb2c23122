"""The decode child: a program that decodes videos for one other process, which may kill it at any time.

It is started by `decode_client.py`, imports nothing but what decoding needs, and ends when its standard input closes
or the thread that started it ends. Requests and answers are one line of JSON each, small enough never to block a pipe;
indices, videos and frames lie in memory that both processes map. All signals that can be held back are, from the first
instruction on: who is interrupted or told to stop decides for its child.
"""

import contextlib
import ctypes
import json
import mmap
import os
import signal
import sys
from typing import Any, cast

import numpy as np

from pretrain.data.video import DecoderName, VideoReader, load_decoder, open_video
from pretrain.errors import BadSample, Refused, TubeletError, reason_of_failure

LARGEST_BUFFER_BYTES = 4 * 2**30
"""More than clips take: 16 frames of 8K video are 1.6 GB, and so are 16 time windows of 16 frames of full HD."""
LONGEST_REASON = 340
"""Characters, of which JSON makes 12 bytes at most; an answer must fit into the 4096 that a pipe never splits."""
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class SharedBuffer:
    """Memory behind a file descriptor that two processes map; it grows as either needs more.

    An array in it stays readable after the buffer has grown, but holds what it held only until the next request.
    """

    def __init__(self, descriptor: int) -> None:
        """Takes the descriptor of a file in memory, which is not closed here."""
        self.descriptor = descriptor
        self._map = memoryview(bytearray())

    def array(self, shape: tuple[int, ...], dtype: type[np.generic] = np.uint8, offset_bytes: int = 0) -> np.ndarray:
        """Returns an array in the buffer.

        Args:
            shape: The array's shape.
            dtype: The type of its elements.
            offset_bytes: Where it begins.

        Raises:
            BadSample: It would end past `LARGEST_BUFFER_BYTES`.
            TubeletError: There is no such memory.
        """
        array_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        end = offset_bytes + array_bytes
        if end > LARGEST_BUFFER_BYTES:
            raise BadSample(
                f"its frames and its file take {end / 2**30:.1f} GiB, more than {LARGEST_BUFFER_BYTES // 2**30} GiB"
            )
        if end > len(self._map):
            if os.fstat(self.descriptor).st_size < end:
                self._grow(end + end // 4)
            self._map = memoryview(mmap.mmap(self.descriptor, 0))
        return np.frombuffer(self._map[offset_bytes:end], dtype).reshape(shape)

    def _grow(self, size_bytes: int) -> None:
        try:
            os.ftruncate(self.descriptor, size_bytes)
        except OSError as error:
            raise TubeletError(
                f"data.decode_limit_s: no {size_bytes / 2**20:.0f} MiB of memory to share with the decode child "
                f"({error.strerror}); raise `ulimit -f`, or set 0 to decode without"
            ) from error

    def free_past(self, kept_bytes: int) -> None:
        """Gives the memory past the first `kept_bytes`, whole pages, back to the system; it reads as zeros after."""
        if len(self._map) > kept_bytes:
            mapped = self._map.obj
            assert isinstance(mapped, mmap.mmap)
            mapped.madvise(mmap.MADV_REMOVE, kept_bytes)


class Decoder:
    """Answers requests about one open video at a time."""

    def __init__(self, buffer: SharedBuffer) -> None:
        """Takes the memory in which requests and answers lie."""
        self.buffer = buffer
        self.reader: VideoReader | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Opens a video, if the request brings one, and reads frames of it, if the request asks for any.

        Args:
            request: `indices`, how many int64 frame numbers stand at the start of the buffer, or null; `video_bytes`,
                the length of the video behind them, or null for the one that is open; `decoder`, who opens it.

        Returns:
            `shape` of the frames that lie at the start of the buffer, or `frames`, how many the video holds, or `bad`,
            why there are none, or `refused`, why the decoder cannot be had at all, or `failed`, what the machine lacks.
        """
        try:
            count = request["indices"]
            indices = self.buffer.array((count or 0,), np.int64).copy()
            if request["video_bytes"] is not None:
                self.reader = None
                video = self.buffer.array((request["video_bytes"],), offset_bytes=indices.nbytes).tobytes()
                self.reader = open_video(video, request["decoder"])
            assert self.reader is not None, "the first request for a video brings it"
            if count is None:
                return {"frames": len(self.reader)}
            return {"shape": self.reader.read(indices, self.buffer.array).shape}
        except Refused as error:
            return {"refused": str(error)[:LONGEST_REASON]}
        except BadSample as error:
            return {"bad": str(error)[:LONGEST_REASON]}
        except TubeletError as error:
            return {"failed": str(error)[:LONGEST_REASON]}
        except Exception as error:
            return {"bad": reason_of_failure(error)[:LONGEST_REASON]}


def end_with_parent(parent: int) -> None:
    """Lets the kernel kill this process when the thread that started it ends, even while it hangs or is stopped."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


def main() -> None:
    """Answers the requests on standard input until it closes: `decode_child PARENT_PID BUFFER_DESCRIPTOR DECODER`."""
    parent, descriptor, decoder = sys.argv[1:]
    end_with_parent(int(parent))
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    with contextlib.suppress(Refused):  # the answer to the first request tells it
        load_decoder(cast(DecoderName, decoder))
    child = Decoder(SharedBuffer(int(descriptor)))
    os.write(answers, b"{}\n")
    for line in sys.stdin.buffer:
        os.write(answers, json.dumps(child.answer(json.loads(line))).encode() + b"\n")


if __name__ == "__main__":
    main()
