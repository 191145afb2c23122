"""What torch.compile needs of a machine and of a run, asked before it starts and not found out at its first step."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch.utils._triton import has_triton

from pretrain.engine.deepspeed_file import read_deepspeed
from pretrain.errors import Refused


def refuse_divided_weights(deepspeed: Path, field: str = "compile") -> None:
    """Raises `Refused` if a DeepSpeed file asks for ZeRO 3, under which a rank finds weights of no length.

    Args:
        deepspeed: The file.
        field: Names what needs whole weights.
    """
    if read_deepspeed(deepspeed).get("zero_optimization", {}).get("stage") == 3:
        raise Refused(f"{field}: does not go with ZeRO 3 of deepspeed {deepspeed}; use zero2, or leave {field} out")


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
