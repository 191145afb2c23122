"""What a failure means: a full disk shows itself in many ways, and what rank 0 tells ends the other ranks silently."""

import os
import re
import tempfile
from pathlib import Path

from pretrain.errors import EXIT_REFUSED, TubeletError
from pretrain.files import is_out_of_space


def means_full_disk(error: BaseException) -> bool:
    """Whether a write failed for want of space; safetensors tells the error's number in its text only."""
    if isinstance(error, OSError):
        return is_out_of_space(error)
    number = re.search(r"\(os error (\d+)\)", str(error))
    return number is not None and is_out_of_space(OSError(int(number[1]), ""))


def has_room(folder: Path, size_bytes: int) -> bool:
    """Whether a file of some size can be written to a folder; quotas and limits have a say, so one is written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(size_bytes))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return not is_out_of_space(error)
    return True


def told_by_main(error: Exception) -> TubeletError:
    """Returns what the other ranks raise where rank 0 raises `error`; unlike that, it can always be sent to them."""
    told = TubeletError(str(error))
    told.told = True
    if isinstance(error, TubeletError):
        told.exit_code = error.exit_code
    elif means_full_disk(error):
        told.exit_code = EXIT_REFUSED
    return told
