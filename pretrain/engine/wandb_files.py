"""Mending the W&B folders of killed attempts, so that `wandb sync` takes all folders of a run at once.

W&B's own process writes what it is sent into a `.wandb` file, some records at a time. Where it is killed with the run,
the file may end within a record, or hold none at all, and `wandb sync` (0.31) then gives up on all later folders of the
run. So the next attempt cuts such a file after its last whole record; what is lost so, that attempt has sent anew.
The file is seven bytes and then the log format of LevelDB: records in parts that do not cross blocks of 32 KiB.
"""

import logging
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

HEADER_BYTES = 7
BLOCK_BYTES = 32 * 1024
PART_BYTES = 7
"""Of a part's own header: a checksum of four bytes, a length of two, and what part of a record it is."""
WHOLE, LAST = 1, 4
FEWEST_RECORDS = 2
"""The first two tell of the file and of the run; without them there is nothing to upload, and an error."""


def mend_folders(wandb: Path, run_id: str, own: Path) -> None:
    """Cuts the files of a run's other attempts after their last whole records; removes folders that hold nothing.

    Args:
        wandb: The run's `wandb/`.
        run_id: The W&B run id.
        own: The folder of the attempt that calls, which is left alone.
    """
    for path in wandb.glob(f"*run-*-{run_id}/*.wandb"):
        if path.parent.resolve() == own.resolve():
            continue
        try:
            records, end_bytes = whole_records(path.read_bytes())
            if records < FEWEST_RECORDS:
                shutil.rmtree(path.parent)
            elif end_bytes < path.stat().st_size:
                os.truncate(path, end_bytes)
        except OSError as error:
            logger.warning("%s cannot be mended (%s); wandb sync may stop at it", path, error)


def is_whole(path: Path) -> bool:
    """Returns whether a `.wandb` file ends with how its run ended, which W&B's process writes last."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at run time

    last = b""
    for record, _ in _records(path.read_bytes()):
        last = record
    return Record.FromString(last).WhichOneof("record_type") == "exit"


def whole_records(content: bytes) -> tuple[int, int]:
    """Returns how many whole records a `.wandb` file holds, and where the last of them ends."""
    ends = [end for _, end in _records(content)]
    return len(ends), ends[-1] if ends else HEADER_BYTES


def _records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Yields each whole record of a `.wandb` file, and where it ends."""
    place, record = HEADER_BYTES, b""
    while place + PART_BYTES <= len(content):
        rest_of_block = BLOCK_BYTES - place % BLOCK_BYTES
        if rest_of_block < PART_BYTES:
            place += rest_of_block
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        start, place = place + PART_BYTES, place + PART_BYTES + length
        if kind == 0 or place > len(content):
            return
        record += content[start:place]
        if kind in (WHOLE, LAST):
            yield record, place
            record = b""
