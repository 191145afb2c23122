"""Starting the processes of a run and letting them talk.

accelerate and DeepSpeed each have a belief about how many processes there are, and on CPU they can disagree without
any error: every rank then reads rank 0's data and writes rank 0's files. So what they believe is checked against
`WORLD_SIZE` before anything else happens.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from pretrain.errors import Refused, TubeletError

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_DEEPSPEED")
Precision = Literal["fp32", "bf16", "fp16"]
Result = TypeVar("Result")


class Processes:
    """All processes of a run, as one of them sees them.

    Args:
        precision: Arithmetic of the forward and backward pass.
        accumulation: Micro-batches in one optimiser step.
        micro_batch: Samples in a micro-batch.
        clip_grad: Greatest gradient norm, or None.
        deepspeed: File of a DeepSpeed configuration, or None for plain data parallelism.

    Raises:
        Refused: The device cannot compute in `precision`.
        TubeletError: accelerate or DeepSpeed believes in another number of processes than the launcher started.
    """

    def __init__(
        self,
        precision: Precision = "fp32",
        accumulation: int = 1,
        micro_batch: int = 1,
        clip_grad: float | None = None,
        deepspeed: Path | None = None,
    ) -> None:
        """Joins the process group that the launcher's environment variables describe."""
        on_gpu = torch.cuda.is_available()
        if precision == "fp16" and not on_gpu:
            raise Refused("precision: fp16 needs a GPU; use bf16 or fp32")
        if not on_gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        from accelerate import Accelerator
        from accelerate.utils import DistributedType, InitProcessGroupKwargs

        self._environment = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
        self.uses_deepspeed = deepspeed is not None
        if self.uses_deepspeed:
            _describe_single_process()
            if not on_gpu:
                _spare_compiler()
        grouped = self.uses_deepspeed or launched_world() > 1
        handlers = [InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo")] if grouped else []
        self.accelerator = Accelerator(
            cpu=None if on_gpu or self.uses_deepspeed else True,
            mixed_precision="no" if precision == "fp32" else precision,
            gradient_accumulation_steps=accumulation,
            deepspeed_plugin=_deepspeed_plugin(deepspeed, precision, accumulation, micro_batch, clip_grad)
            if deepspeed
            else None,
            kwargs_handlers=handlers,
            step_scheduler_with_optimizer=False,
        )
        launched = launched_world()
        if self.accelerator.num_processes != launched:
            raise TubeletError(
                f"accelerate believes in {self.accelerator.num_processes} processes, but the launcher started "
                f"{launched}; every rank would read the same data"
            )
        believed = self.accelerator.distributed_type
        if self.uses_deepspeed and believed != DistributedType.DEEPSPEED:
            raise TubeletError(f"accelerate believes in {believed} although DeepSpeed was asked for")
        self.world: int = launched
        self.rank: int = self.accelerator.process_index
        self.device: torch.device = self.accelerator.device
        # Small messages go over gloo, so that they never wait for the GPU.
        self._messages = torch.distributed.new_group(backend="gloo") if launched > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes what all share."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.world > 1:
            torch.distributed.barrier(group=self._messages)

    def gather(self, values: Tensor) -> Tensor:
        """Returns `(world, K)`: the `(K,)` float64 CPU tensors of all ranks."""
        if self.world == 1:
            return values.unsqueeze(0)
        gathered = [torch.empty_like(values) for _ in range(self.world)]
        torch.distributed.all_gather(gathered, values, group=self._messages)
        return torch.stack(gathered)

    def gather_objects(self, value: Any) -> list[Any]:
        """Returns the objects of all ranks, on every rank."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(gathered, value, group=self._messages)
        return gathered

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Runs `action` on rank 0 and returns its result on every rank; where it raises, every rank raises."""
        result = self.on_main_only(action)
        return self.gather_objects(result)[0]

    def on_main_only(self, action: Callable[[], Result]) -> Result | None:
        """Runs `action` on rank 0, which alone gets its result; where it raises, every rank raises."""
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except Exception as raised:
                error = raised
        error = self.gather_objects(error)[0]
        if error is not None:
            error.told = not self.is_main  # rank 0 says it for all
            raise error
        return result

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Wraps model and optimiser for this world; raises `TubeletError` if DeepSpeed sees another world."""
        model, optimizer = self.accelerator.prepare(model, optimizer)
        if self.uses_deepspeed and torch.distributed.get_world_size() != self.world:
            raise TubeletError(
                f"DeepSpeed runs with {torch.distributed.get_world_size()} processes, but the launcher started "
                f"{self.world}"
            )
        return model, optimizer

    def __enter__(self) -> "Processes":
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves the process group, so that the same process can start another run."""
        from accelerate.state import AcceleratorState, GradientState

        self.accelerator.free_memory()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def started_as_main() -> bool:
    """Whether the launcher calls this process rank 0; true before any process group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def launched_world() -> int:
    """Returns how many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _describe_single_process() -> None:
    """DeepSpeed reads a launcher's variables; a plain `python -m pretrain` has none."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def _spare_compiler() -> None:
    """On CPU, DeepSpeed compiles a kernel that speaks through shared memory, whose ranks spin when one is killed."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _deepspeed_plugin(
    file: Path, precision: Precision, accumulation: int, micro_batch: int, clip_grad: float | None
) -> Any:
    """Completes a DeepSpeed file with what the run's own configuration decides."""
    from accelerate.utils import DeepSpeedPlugin

    content = json.loads(file.read_text())
    content["train_micro_batch_size_per_gpu"] = micro_batch
    content["gradient_accumulation_steps"] = accumulation
    content["gradient_clipping"] = clip_grad or 0.0
    content["bf16"] = {"enabled": precision == "bf16"}
    content["fp16"] = {"enabled": precision == "fp16"}
    return DeepSpeedPlugin(hf_ds_config=content)
