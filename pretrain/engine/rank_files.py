"""The files that one rank writes into a checkpoint: written at once, or copied into host memory and written later.

What is copied no longer changes with the model, so a thread can write it while training goes on. Copies keep what
shares memory shared, and their memory is used again by the next copy. Under DeepSpeed its own `save_checkpoint` says
what belongs into which file, and hands it over to be written where it would write it itself.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from pretrain.engine.averaging import AVERAGE, WeightAverage
from pretrain.engine.distributed import Processes
from pretrain.engine.manifest import describe_files
from pretrain.engine.universal import CLIENT_STATE, TAG
from pretrain.errors import TubeletError

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"

Written = dict[str, Any] | Exception
"""Size and hash of each file that a rank wrote, or the error that stopped it."""

Taking = Callable[[Callable[[Any, Path], None], Any, Path], None]
"""Is handed what writes a file, its content and its path, and writes it now or later."""


class RankFiles:
    """Knows the files of this rank, and writes them.

    No method raises: a failure of any library must reach rank 0 as a report, or the other ranks wait for ever.

    Args:
        processes: All processes of the run.
    """

    def __init__(self, processes: Processes) -> None:
        """Copies nothing yet."""
        self.processes = processes
        self.average: WeightAverage | None = None  # goes into checkpoints too where there is one

    @functools.cached_property
    def _stager(self) -> Any:
        """What copies into memory of the host, which it keeps for the next copy."""
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions  # a second to import

        on_gpu = self.processes.device.type == "cuda"
        return DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
            )
        )

    def write(self, folder: Path, model: nn.Module, optimizer: Any) -> Written:
        """Writes, syncs and hashes this rank's files; every rank calls it."""
        try:
            self._hand_over(folder, model, optimizer, lambda write, content, path: write(content, path))
            return self._describe(folder)
        except Exception as error:
            return error

    def copy(
        self, folder: Path, model: nn.Module, optimizer: Any, more: Any = None
    ) -> tuple[Callable[[], Written], Any]:
        """Copies what belongs into this rank's files, and more, into host memory; every rank calls it.

        Args:
            folder: Where the files belong.
            model: The prepared model.
            optimizer: The prepared optimiser.
            more: Dictionaries and lists of tensors; the model's weights among them are copied once for both.

        Returns:
            What writes, syncs and hashes the files, in any thread, and the copy of `more`. Both have to have done their
            service before the next copy, which goes into the same memory.
        """
        files: list[tuple[Callable[[Any, Path], None], Any, Path]] = []
        try:
            self._hand_over(folder, model, optimizer, lambda *file: files.append(file))
            *contents, more = self._stager.stage([*(content for _, content, _ in files), more])
        except Exception as error:
            failure = error  # the name of an exception ends with its clause
            return lambda: failure, None
        copies = [(write, copied, path) for (write, _, path), copied in zip(files, contents, strict=True)]
        return lambda: self._write_copies(folder, copies), more

    def _write_copies(self, folder: Path, copies: list[tuple[Callable[[Any, Path], None], Any, Path]]) -> Written:
        try:
            for write, content, path in copies:
                write(content, path)
            return self._describe(folder)
        except Exception as error:
            return error

    def _hand_over(self, folder: Path, model: nn.Module, optimizer: Any, take: Taking) -> None:
        if self.average and self.processes.is_main:
            take(save_file, dict(self.average.weights()), folder / AVERAGE)
        if self.processes.uses_deepspeed:
            _hand_over_with_deepspeed(model, folder, take)
        elif self.processes.is_main:
            take(save_file, dict(self.processes.accelerator.unwrap_model(model).state_dict()), folder / WEIGHTS)
            scaler = self.processes.accelerator.scaler
            content = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
            take(torch.save, content, folder / OPTIMIZER)

    def _describe(self, folder: Path) -> dict[str, Any]:
        return describe_files(folder, (path for path in folder.rglob("*") if path.is_file() and self._is_own(path)))

    def _is_own(self, path: Path) -> bool:
        """DeepSpeed names what a rank wrote after it; all else is rank 0's."""
        if "zero_pp_rank_" in path.name:
            return f"zero_pp_rank_{self.processes.rank}_" in path.name
        return self.processes.is_main

    def check_complete(self, folder: Path, files: dict[str, Any]) -> None:
        """Raises `TubeletError` if what all ranks report is not what is there, or lacks a file that must be there."""
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        if there != set(files):
            raise TubeletError(f"{folder}: {sorted(there ^ set(files))} were not reported by the rank that owns them")
        for rank, needed in self._needed():
            if not any(all(part in name for part in needed) for name in files):
                raise TubeletError(f"{folder}: rank {rank} left no file named like {'*'.join(needed)}")

    def _needed(self) -> list[tuple[int, tuple[str, ...]]]:
        """What must be in a checkpoint: parts of file names, each with the rank that writes it."""
        needed: list[tuple[int, tuple[str, ...]]] = [(0, (AVERAGE,))] if self.average else []
        if not self.processes.uses_deepspeed:
            return [*needed, (0, (WEIGHTS,)), (0, (OPTIMIZER,))]
        needed += [(0, ("model_states.pt",))]
        if zero_stage(self.processes) > 0:
            needed += [(rank, (f"zero_pp_rank_{rank}_", "optim_states.pt")) for rank in range(self.processes.world)]
        return needed


def zero_stage(processes: Processes) -> int:
    """Returns the ZeRO stage in use."""
    return processes.accelerator.state.deepspeed_plugin.zero_stage


def _hand_over_with_deepspeed(engine: Any, folder: Path, take: Taking) -> None:
    """A rank that fails joins the barrier at which DeepSpeed lets the others wait for it, else they wait on."""
    try:
        with _taken_from(engine.checkpoint_engine, take):
            engine.save_checkpoint(folder, tag=TAG, client_state=CLIENT_STATE, save_latest=False)
    except Exception:
        if torch.distributed.get_world_size() > 1:
            torch.distributed.barrier()
        raise


@contextlib.contextmanager
def _taken_from(checkpoint_engine: Any, take: Taking) -> Iterator[None]:
    """Takes what DeepSpeed would write, while the context is open."""
    write = checkpoint_engine.save
    checkpoint_engine.save = lambda state_dict, path: take(write, state_dict, Path(path))
    try:
        yield
    finally:
        del checkpoint_engine.save  # which bares the method again
