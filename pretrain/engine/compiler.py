"""What torch.compile needs of a machine, asked before a run starts instead of found out at its first step."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch.utils._triton import has_triton

from pretrain.errors import Refused


def refuse_without_compiler() -> None:
    """Raises `Refused` if torch.compile cannot work here, with what is missing.

    On a GPU it writes Triton, which builds its launchers with a C compiler; elsewhere it writes C++. Both include
    Python's own headers.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu and not has_triton():
        raise Refused("compile: needs triton on a GPU, and it is missing or too old; pip install -U triton")
    wanted = [os.environ["CC"]] if on_gpu and "CC" in os.environ else ["gcc", "clang"]
    if not on_gpu:
        wanted = [os.environ.get("CXX", "g++")]
    if not any(map(shutil.which, wanted)):
        raise Refused(f"compile: needs the compiler {' or '.join(wanted)}; install it, or leave compile out")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise Refused(f"compile: needs {header}; install Python's headers (python3-dev), or leave compile out")
