"""The folder that an evaluation, a comparison or explanations go to, and one line for what may go wrong with it."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pretrain.errors import DiskFull, Refused
from pretrain.files import is_out_of_space


@contextlib.contextmanager
def writing_to(out: Path, option: str = "--out") -> Iterator[None]:
    """Makes one line of what may go wrong when files are written to a folder that an option names."""
    try:
        yield
    except OSError as error:
        if is_out_of_space(error):
            raise DiskFull(f"{out}: no space left on the disk; free some or give another {option}") from None
        raise Refused(f"{out}: cannot be written ({error.strerror}); give another {option}") from None


def make_writable(out: Path, option: str = "--out") -> None:
    """Makes a folder and tries to write to it, so that no evaluation ends in a folder that takes no files."""
    with writing_to(out, option):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(bytes(1 << 16))
