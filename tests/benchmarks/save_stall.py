"""How long the step that saves stalls training: written at once, and beside training from a copy in host memory.

`python -m tests.benchmarks.save_stall`; one process on CPU, a model of ViT-S's size with AdamW's states, and an export
of its weights after each checkpoint. Beside training, the copy and the commit stall; the first copy makes the memory
that the others use again. Where the disk is fast, a save at once is short, and the copy more of it.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from pretrain.commandline import find_recipe
from pretrain.engine.checkpoint import CheckpointConfig, Checkpoints
from pretrain.engine.distributed import Processes
from pretrain.engine.ownership import RunLock
from pretrain.engine.saving import Exported, Saving, whole_weights
from pretrain.files import replacing

BLOCKS, WIDTH, REPEATS = 12, 384, 8
ENGINES = {"plain": None, "ZeRO 2": "zero2"}


def model_of_size_s() -> nn.Module:
    """Twelve blocks as wide as ViT-S's, with as many weights (21 million)."""
    layers = [nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, batch_first=True) for _ in range(BLOCKS)]
    return nn.Sequential(*layers)


def seconds_of(action: Callable[[], None]) -> float:
    """Returns how long an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def stalls(processes: Processes, out: Path, background: bool) -> list[tuple[float, float]]:
    """Returns the seconds that each of some saves, and its commit where that comes later, stalls training."""
    model = model_of_size_s()
    model, optimizer = processes.prepare(model, torch.optim.AdamW(model.parameters()))
    processes.accelerator.backward(model(torch.randn(2, 8, WIDTH)).square().mean())
    optimizer.step()

    def write(weights: dict[str, torch.Tensor]) -> None:
        with replacing(out / "model.safetensors") as temporary:
            save_file(weights, temporary)

    def export(prepared: nn.Module) -> Exported:
        return Exported(whole_weights(processes, prepared) or {}, write)

    lock = RunLock(out)
    checkpoints = Checkpoints(out / "checkpoints", processes, lock, CheckpointConfig(background=background))
    saving = Saving(checkpoints, processes, export)
    stalled = []
    for step in range(1, REPEATS + 2):
        save_s = seconds_of(lambda step=step: saving.save(step, model, optimizer, {}))  # type: ignore[misc]
        while not saving.is_written:  # training goes on
            time.sleep(0.01)
        stalled.append((save_s, seconds_of(saving.commit) if background else 0))
        saving.finish()
    lock.release()
    return stalled


def main() -> None:
    """Prints for each engine the seconds of both ways and their ratio: the least, which others disturbed least."""
    for name, recipe in ENGINES.items():
        file = find_recipe(recipe, "deepspeed", ".json") if recipe else None
        with Processes(deepspeed=file) as processes, tempfile.TemporaryDirectory() as temporary:
            _, *at_once = stalls(processes, Path(temporary), background=False)
        with Processes(deepspeed=file) as processes, tempfile.TemporaryDirectory() as temporary:
            first, *beside = stalls(processes, Path(temporary), background=True)
        blocking = min(save_s for save_s, _ in at_once)
        copied, committed = (min(column) for column in zip(*beside, strict=True))
        print(
            f"{name}: at once {blocking:.2f} s; beside training {copied:.3f} s (the first {first[0]:.3f} s) and "
            f"{committed:.3f} s to commit: {100 * (copied + committed) / blocking:.1f} % of that",
            flush=True,
        )


if __name__ == "__main__":
    main()
