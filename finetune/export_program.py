"""The file of torch.export: a program that torch runs, or compiles ahead of time.

    program = torch.export.load("model.pt2", extra_files=(told := {"tubelet.json": ""})).module()
    logits = program(clips)                       # clips (B, T, H, W, 3) uint8, any B
    classes = json.loads(told["tubelet.json"])["classes"]

It needs neither Tubelet nor timm.
"""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def write(model: nn.Module, clips: Tensor, metadata: dict[str, str], file: Path) -> None:
    """Writes a model as a program for any number of clips; arguments as for `Format.write`."""
    program = torch.export.export(model, (clips,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    content = io.BytesIO()  # of a full disk torch would tell with a traceback
    torch.export.save(program, content, extra_files=metadata)
    file.write_bytes(content.getbuffer())


def read(file: Path) -> Callable[[Tensor], Tensor]:
    """Returns the function from clips to logits that a file holds."""
    with open(file, "rb") as opened:
        return torch.export.load(opened).module()
