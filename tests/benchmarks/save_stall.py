"""How long a save stalls training, and which part of it a copy in memory would be: what saving beside training needs.

`python -m tests.benchmarks.save_stall`; one process on CPU, a model of ViT-S's size with AdamW's states.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from pretrain.engine.checkpoint import CheckpointConfig, Checkpoints
from pretrain.engine.distributed import Processes
from pretrain.engine.ownership import RunLock

BLOCKS, WIDTH, REPEATS = 12, 384, 3


def model_of_size_s() -> nn.Module:
    """Twelve blocks as wide as ViT-S's, with as many weights (21 million)."""
    layers = [nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, batch_first=True) for _ in range(BLOCKS)]
    return nn.Sequential(*layers)


def main() -> None:
    """Prints the seconds of a blocking save and of a copy into memory that is there already, and their ratio."""
    with Processes() as processes, tempfile.TemporaryDirectory() as temporary:
        model = model_of_size_s()
        model, optimizer = processes.prepare(model, torch.optim.AdamW(model.parameters()))
        processes.accelerator.backward(model(torch.randn(2, 8, WIDTH)).square().mean())
        optimizer.step()
        out = Path(temporary)
        checkpoints = Checkpoints(out / "checkpoints", processes, RunLock(out), CheckpointConfig())
        tensors = [*model.state_dict().values()]
        tensors += [value for state in optimizer.state.values() for value in state.values()]
        kept = [tensor.clone() for tensor in tensors]
        saves, copies = [], []
        for step in range(1, REPEATS + 1):
            started = time.perf_counter()
            checkpoints.save(step, model, optimizer, {})
            saves.append(time.perf_counter() - started)
            started = time.perf_counter()
            torch._foreach_copy_(kept, tensors)
            copies.append(time.perf_counter() - started)
    save, copied = statistics.median(saves), statistics.median(copies)
    print(f"blocking save {save:.2f} s, copy in memory {copied:.3f} s: {100 * copied / save:.1f} % of it")


if __name__ == "__main__":
    main()
