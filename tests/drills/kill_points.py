"""Kills a process between two file operations of a checkpoint: a tracer of calls counts them, and ends it at one.

The tracer sees calls out of Python, whether into the interpreter, torch or safetensors, before and after each; it
watches nothing but what saves, in whichever thread, so that what kills is the protocol's own order of operations.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from pretrain.engine.checkpoint import Checkpoints
from pretrain.engine.rank_files import RankFiles

PYTHON = {"open", "write", "close", "flush", "fsync", "mkdir", "rename", "replace", "link", "unlink", "rmdir", "remove"}
LIBRARIES = {"write_record", "write_record_metadata", "write_end_of_file", "serialize_file"}
OPERATIONS = PYTHON | LIBRARIES


def install(kill_at: int, counts: Path) -> None:
    """Watches every save of this process, those beside training too.

    Args:
        kill_at: At which operation, counted from 1 over all saves, the process kills itself; 0 for never.
        counts: File to which the number of operations so far is appended after each commit.
    """
    seen = 0

    def watch(frame: FrameType, event: str, function: Any) -> None:
        nonlocal seen
        if event in ("c_call", "c_return") and getattr(function, "__name__", "") in OPERATIONS:
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def watching(*arguments: Any) -> Any:
            before = sys.getprofile()
            sys.setprofile(watch)
            try:
                return method(*arguments)
            finally:
                sys.setprofile(before)

        return watching

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def counting(*arguments: Any) -> Any:
            result = method(*arguments)
            with open(counts, "a") as file:
                file.write(f"{seen}\n")
            return result

        return counting

    for owner, names in ((Checkpoints, ("save", "begin", "finish")), (RankFiles, ("_write_copies",))):
        for name in names:
            setattr(owner, name, watched(getattr(owner, name)))
    Checkpoints._commit = counted(Checkpoints._commit)  # type: ignore[method-assign]
