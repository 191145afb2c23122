"""Decoding in a process of its own, the decode child, that can be killed and replaced.

Decoders are C code that meets other people's files: they hang, they crash, and decord keeps the whole input of each
file that it cannot open. So each process (in truth each thread) that reads samples has one child that decodes for it:
started at the first decode, killed when a decode takes too long, replaced when it died or has met enough bad files,
and gone when its user is. Videos and frames pass through shared memory, which nobody copies.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any, NoReturn

import numpy as np

from pretrain.data.decode_child import SharedBuffer
from pretrain.data.processes import signals_held_back
from pretrain.data.video import Allocate, DecoderName, VideoReader, open_video
from pretrain.errors import BadSample, Refused, TubeletError

DECODE_LIMIT_S = 60.0
LONGEST_LIMIT_S = 86400
START_LIMIT_S = 600
"""How long a child may take to import its decoder: from a file system that a whole cluster starts from, minutes."""
WAIT_AT_ONCE_S = 0.25
"""A limit is waited for in pieces, so that the time in which a job or a terminal suspends all processes is none."""
BAD_FILES_PER_CHILD = 32
BAD_BYTES_PER_CHILD = 32 * 2**20
"""A child is replaced after so many bad files, or bad files of so many bytes, which decord has kept."""
CHILD_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    # Or the C library gives the memory of frames back after each video, and a sixth of the time goes into getting it.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}
KEPT_BYTES = 64 * 2**20
"""What stays of the shared memory between two videos."""


def open_video_apart(
    video: bytes, decoder: DecoderName = "auto", limit_s: float | None = DECODE_LIMIT_S
) -> VideoReader:
    """Opens a video in this thread's decode child.

    Nothing is sent before the first use of the reader, so that opening and reading are one exchange; what opening would
    raise is raised there. What `read` returns lies in shared memory, and changes at the next use of any reader that
    this thread opened: copy what must last.

    Args:
        video: The file.
        decoder: Who decodes it.
        limit_s: Seconds that opening and one read may take together; None or 0 decodes in this process, without limit.

    Returns:
        A reader that raises `BadSample` as the decoder does, and also if it takes too long or dies.
    """
    if not limit_s:
        return open_video(video, decoder)
    return _VideoApart(video, decoder, limit_s)


def refuse_decode_limit(field: str, limit_s: float | None) -> None:
    """Raises `Refused` for a limit in seconds that cannot be; None and 0 stand for no limit."""
    if limit_s is not None and not 0 <= limit_s <= LONGEST_LIMIT_S:
        raise Refused(f"{field}: {limit_s} must lie between 0, which sets no limit, and {LONGEST_LIMIT_S} seconds")


class _VideoApart:
    def __init__(self, video: bytes, decoder: DecoderName, limit_s: float) -> None:
        self.video, self.decoder, self.limit_s = video, decoder, limit_s

    def __len__(self) -> int:
        return client_of_thread().ask(self, None)["frames"]

    def read(self, indices: np.ndarray, allocate: Allocate | None = None) -> np.ndarray:
        client = client_of_thread()
        shape = tuple(client.ask(self, indices)["shape"])
        frames = client.buffer.array(shape)
        if allocate is None:
            return frames
        own = allocate(shape)
        own[...] = frames
        return own


class DecodeClient:
    """A decode child as the process that it works for sees it.

    Attributes:
        buffer: The memory shared with the child.
        pid: The child's process id, None while there is none.
    """

    def __init__(self) -> None:
        """Starts nothing yet."""
        self.owner = os.getpid()
        self.pid: int | None = None
        self._opened: _VideoApart | None = None
        self._is_asking = False
        self._used_bytes = 0

    def ask(self, video: _VideoApart, indices: np.ndarray | None) -> dict[str, Any]:
        """Lets the child read frames of a video.

        Args:
            video: The video; it is sent unless it is the one that the child has open.
            indices: The frames' numbers; None asks how many the video holds.

        Returns:
            The child's answer, see `Decoder.answer`.

        Raises:
            BadSample: The video cannot be decoded, or not in time, or the decoder crashed.
            Refused: The decoder is not installed, or lacks its libraries.
            TubeletError: No child can be started, or it lacks what the machine should give it.
        """
        if self._is_asking:
            self._end()  # an exception cut the last exchange off: what comes next might be the answer to that
        self._is_asking = True
        line = self._exchange(video, indices)
        self._is_asking = False
        if line is None:
            self._end()
            raise BadSample(f"decoding it took longer than the {video.limit_s:g} s that decode_limit_s allows")
        if not line:
            raise BadSample(f"its decoder {self._how_it_ended()}")
        answer = json.loads(line)
        if "refused" in answer or "failed" in answer:
            self._opened = None
            raise Refused(answer["refused"]) if "refused" in answer else TubeletError(answer["failed"])
        if "bad" in answer:
            self._note_bad(video)
            raise BadSample(answer["bad"])
        if "shape" in answer:
            self._used_bytes = max(self._used_bytes, int(np.prod(answer["shape"], dtype=np.int64)))
        return answer

    def _exchange(self, video: _VideoApart, indices: np.ndarray | None) -> bytes | None:
        """Sends a request, to a new child if there is none, and returns what `_answer` does."""
        sent = False
        while not sent:
            if self.pid is None:
                self._start(video.decoder)
            sent = self._send(video, indices)
        return self._answer(video.limit_s)

    def _send(self, video: _VideoApart, indices: np.ndarray | None) -> bool:
        """Writes a request; returns False if the child has ended, for which this video is not to blame."""
        if self._used_bytes > KEPT_BYTES:
            self.buffer.free_past(KEPT_BYTES)
        self._used_bytes = 0
        numbers = np.empty(0, np.int64) if indices is None else indices.astype(np.int64)
        self.buffer.array(numbers.shape, np.int64)[...] = numbers
        is_new = self._opened is not video
        if is_new:
            place = self.buffer.array((len(video.video),), offset_bytes=numbers.nbytes)
            place[...] = np.frombuffer(video.video, np.uint8)
            self._opened = video
            self._used_bytes = numbers.nbytes + len(video.video)
        request = {
            "indices": None if indices is None else len(numbers),
            "video_bytes": len(video.video) if is_new else None,
            "decoder": video.decoder,
        }
        try:
            os.write(self._requests, json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            self._end()
            return False
        return True

    def _answer(self, limit_s: float) -> bytes | None:
        """The child's answer, empty if it died, or None if it does not come in time."""
        waited_s = 0.0
        while not self._poll.poll(min(limit_s - waited_s, WAIT_AT_ONCE_S) * 1000):
            waited_s += WAIT_AT_ONCE_S
            if waited_s >= limit_s:
                return None
        return os.read(self._answers, select.PIPE_BUF)

    def _note_bad(self, video: _VideoApart) -> None:
        self._opened = None
        self._bad_files += 1
        self._bad_bytes += len(video.video)
        if self._bad_files >= BAD_FILES_PER_CHILD or self._bad_bytes >= BAD_BYTES_PER_CHILD:
            self._end()

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        self._end()
        if code < 0:
            hint = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
            return f"was ended by {signal.Signals(-code).name}{hint}"
        return f"ended with exit code {code}"

    def _start(self, decoder: DecoderName) -> None:
        self._end()
        self._process, descriptor = _spawned(self.owner, decoder)
        self._finalizer = weakref.finalize(self, _kill, self._process, descriptor, self.owner)
        self.buffer = SharedBuffer(descriptor)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._answers, select.POLLIN)
        self.pid, self._opened = self._process.pid, None
        self._bad_files = self._bad_bytes = self._used_bytes = 0
        if not self._answer(START_LIMIT_S):
            self._refuse()

    def _refuse(self) -> NoReturn:
        code = self._process.poll()
        self._end()
        ended = "does not start" if code is None else f"ends with exit code {code} at its start"
        raise TubeletError(
            f"data.decode_limit_s: the process that decodes {ended}; see what it said above, or set 0 to decode without"
        )

    def _end(self) -> None:
        if self.pid is not None:
            self._finalizer()
            self.pid = self._opened = None


def _spawned(owner: int, decoder: DecoderName) -> tuple[subprocess.Popen[bytes], int]:
    """Starts a child with modules of the same places as this process, and returns it with the descriptor it shares."""
    places = os.pathsep.join(place or os.getcwd() for place in sys.path)
    descriptor = -1
    try:
        descriptor = os.memfd_create("decoded video")
        with signals_held_back():
            process = subprocess.Popen(
                # -P, or files of the current folder that are called like modules would be taken for them
                [sys.executable, "-P", "-m", "pretrain.data.decode_child", str(owner), str(descriptor), decoder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=(descriptor,),
                env=os.environ | CHILD_ENVIRONMENT | {"PYTHONPATH": places},
            )
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        raise TubeletError(
            f"data.decode_limit_s: no process that decodes can be started ({error.strerror}); use fewer data.workers, "
            f"raise `ulimit -n` and `ulimit -u`, or set 0 to decode without"
        ) from error
    return process, descriptor


def _kill(process: subprocess.Popen[bytes], descriptor: int, owner: int) -> None:
    """Ends a child and closes what led to it; after a fork it is not ours to kill."""
    if os.getpid() == owner:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    os.close(descriptor)


_own = threading.local()


def client_of_thread() -> DecodeClient:
    """Returns this thread's decode client, whose child starts with its first decode."""
    client = getattr(_own, "client", None)
    if client is None or client.owner != os.getpid():
        client = _own.client = DecodeClient()
    return client
