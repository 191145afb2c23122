"""torchcodec in a process of its own, where it finds the FFmpeg that PyAV's wheel carries: no system package is needed.

torchcodec asks the linker for libavcodec.so.62 and its like, in folders that are settled when a process starts; the
wheel's files have longer names. So the process starts with a folder of links in `LD_LIBRARY_PATH`.
"""

import atexit
import functools
import re
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import av
import numpy as np

from pretrain.data.video import DecoderName, VideoReader, open_video
from tests.runs import own_environment

ROOT = Path(__file__).parents[1]


class TorchCodecInProcess:
    """A video that torchcodec has opened in the other process; raises here what is raised there."""

    def __init__(self, video: bytes) -> None:
        self._number, self._frames = _asked("open", video)

    def __len__(self) -> int:
        return self._frames

    def read(self, indices: np.ndarray) -> np.ndarray:
        return _asked("read", self._number, indices)


def open_with(video: bytes, decoder: DecoderName) -> VideoReader:
    """Opens a video as `open_video` does, with torchcodec in its own process."""
    return TorchCodecInProcess(video) if decoder == "torchcodec" else open_video(video, decoder)


def linked_ffmpeg(folder: Path) -> str:
    """Fills a folder with links to PyAV's FFmpeg under its plain names; returns the value for `LD_LIBRARY_PATH`."""
    wheel = Path(av.__file__).parents[1] / "av.libs"
    for library in wheel.glob("lib*.so.*"):
        plain = re.match(r"(lib(?:av|sw)\w+)-[0-9a-f]+(\.so\.\d+)", library.name)
        if plain:
            (folder / "".join(plain.groups())).symlink_to(library)
    return f"{folder}:{wheel}"


def _asked(*request: Any) -> Any:
    connection = _process()
    connection.send(request)
    answer = connection.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


@functools.cache
def _process() -> Connection:
    ours, theirs = Pipe()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**own_environment(), "LD_LIBRARY_PATH": linked_ffmpeg(Path(folder))}
        command = [sys.executable, "-m", "tests.torchcodec_process", str(theirs.fileno())]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
        atexit.register(process.kill)
        theirs.close()
        assert ours.recv() == "ready"  # the libraries are loaded: the links may go
    return ours


def main() -> None:
    """Answers requests until the other side has gone."""
    from pretrain.data.torchcodec_reader import import_torchcodec

    connection = Connection(int(sys.argv[1]))
    import_torchcodec()
    connection.send("ready")
    readers: list[VideoReader] = []
    while True:
        try:
            request, *arguments = connection.recv()
        except EOFError:
            return
        try:
            if request == "open":
                readers.append(open_video(arguments[0], "torchcodec"))
                answer: Any = (len(readers) - 1, len(readers[-1]))
            else:
                answer = readers[arguments[0]].read(arguments[1])
        except Exception as error:
            answer = error
        connection.send(answer)


if __name__ == "__main__":
    main()
