"""Kills a process between two file operations of a checkpoint: a tracer of calls counts them, and ends it at one.

The tracer sees calls out of Python, whether into the interpreter, torch or safetensors, before and after each; it
watches nothing but `Checkpoints.save`, so that what kills is the protocol's own order of operations.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from pretrain.engine.checkpoint import Checkpoints

PYTHON = {"open", "write", "close", "flush", "fsync", "mkdir", "rename", "replace", "link", "unlink", "rmdir", "remove"}
LIBRARIES = {"write_record", "write_record_metadata", "write_end_of_file", "serialize_file"}
OPERATIONS = PYTHON | LIBRARIES


def install(kill_at: int, counts: Path) -> None:
    """Watches every save of this process.

    Args:
        kill_at: At which operation, counted from 1 over all saves, the process kills itself; 0 for never.
        counts: File to which the number of operations of each save is appended.
    """
    save, seen = Checkpoints.save, 0

    def watch(frame: FrameType, event: str, function: Any) -> None:
        nonlocal seen
        if event in ("c_call", "c_return") and getattr(function, "__name__", "") in OPERATIONS:
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched(*arguments: Any) -> None:
        before = seen
        sys.setprofile(watch)
        try:
            save(*arguments)
        finally:
            sys.setprofile(None)
        with open(counts, "a") as file:
            file.write(f"{seen - before}\n")

    Checkpoints.save = watched  # type: ignore[method-assign]
