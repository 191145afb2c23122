"""Starting the processes of a run and letting them talk.

torchrun, `accelerate launch` and `deepspeed` tell each process by the same variables who it is; what srun tells is
translated into them. accelerate and DeepSpeed each have a belief about how many processes there are, and on CPU they
can disagree without any error: every rank then reads rank 0's data and writes rank 0's files. So what they believe is
checked against `WORLD_SIZE` before anything else happens.
"""

import os
import re
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from pretrain.engine.deepspeed_file import completed
from pretrain.engine.devices import (
    Precision,
    agree_on_devices,
    device_here,
    host_name,
    missing_interface,
    network_told,
    refuse_unfit,
)
from pretrain.engine.failures import told_by_main
from pretrain.errors import Refused, TubeletError

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN_VARIABLES = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
PLUGIN_VARIABLES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")
SRUN_PORTS = range(20_000, 30_000)  # below those that Linux hands out by itself
PATIENCE_S = 60.0  # far below what a process group lets a message wait
SCONTROL_S = 60
Result = TypeVar("Result")


class Processes:
    """All processes of a run, as one of them sees them.

    Args:
        precision: Arithmetic of the forward and backward pass.
        accumulation: Micro-batches in one optimiser step.
        micro_batch: Samples in a micro-batch.
        clip_grad: Greatest gradient norm, or None.
        deepspeed: File of a DeepSpeed configuration, or None for plain data parallelism.
        meet_within_s: How long to wait for processes that have not started yet; None is as long as torch waits.
        problem: Why this one cannot take part, with the remedy, which all are told when they meet; None if it can.

    Raises:
        Refused: One cannot take part, a device cannot compute in `precision`, only some nodes have GPUs, this node
            lacks the network interface that a variable names, or accelerate's own settings contradict the arguments.
        TubeletError: Not all processes came, the network fails, or accelerate or DeepSpeed believes in another number
            of them than the launcher started.
    """

    def __init__(
        self,
        precision: Precision = "fp32",
        accumulation: int = 1,
        micro_batch: int = 1,
        clip_grad: float | None = None,
        deepspeed: Path | None = None,
        meet_within_s: float | None = None,
        problem: str | None = None,
    ) -> None:
        """Joins the process group that the launcher's environment variables describe."""
        _refuse_plugins(allowed="ACCELERATE_USE_DEEPSPEED" if deepspeed or problem else None)
        on_gpu = torch.cuda.is_available()
        content = None
        try:
            if deepspeed:
                content = completed(deepspeed, precision, accumulation, micro_batch, clip_grad)
        except Refused as error:
            problem = str(error)
        if not on_gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        self._environment = {name: os.environ.get(name) for name in (*LAUNCHER_VARIABLES, "ACCELERATE_USE_DEEPSPEED")}
        self.uses_deepspeed = deepspeed is not None
        if _started_by_srun():
            _describe_srun()
        self._store = self._compare_devices(precision, meet_within_s, problem)
        if self.uses_deepspeed:
            _describe_single_process()
            if not on_gpu:
                _spare_compiler()
        grouped = self.uses_deepspeed or launched_world() > 1
        handlers = [InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo")] if grouped else []
        self.world: int = launched_world()
        try:
            with network_told():
                self.accelerator = Accelerator(
                    cpu=None if on_gpu or self.uses_deepspeed else True,
                    mixed_precision="no" if precision == "fp32" else precision,
                    gradient_accumulation_steps=accumulation,
                    deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=content) if content else None,
                    kwargs_handlers=handlers,
                    step_scheduler_with_optimizer=False,
                )
        except TubeletError:
            self._leave()
            raise
        self.rank: int = self.accelerator.process_index
        self.device: torch.device = self.accelerator.device
        try:
            self._check_beliefs(accumulation)
            # Small messages go over gloo, so that they never wait for the GPU.
            self._messages = _message_group() if self.world > 1 else None
        except TubeletError:
            self.__exit__()
            raise

    def _compare_devices(self, precision: Precision, meet_within_s: float | None, problem: str | None) -> Any:
        """Raises where ranks have problems or their devices do not fit; returns the store in which they were told."""
        here = device_here(precision)
        interface = missing_interface() if launched_world() > 1 else None
        here = here._replace(problem=problem or here.problem or interface)
        try:
            if launched_world() > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
                return agree_on_devices(here, meet_within_s)
            refuse_unfit([here])
        except TubeletError:
            self._restore_environment()
            raise
        return None

    def _check_beliefs(self, accumulation: int) -> None:
        """Compares what accelerate made of its environment with what was asked for."""
        from accelerate.utils import DistributedType

        if self.accelerator.num_processes != self.world:
            raise TubeletError(
                f"accelerate believes in {self.accelerator.num_processes} processes, but the launcher started "
                f"{self.world}; every rank would read the same data"
            )
        plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        believed = self.accelerator.distributed_type
        if believed not in ((DistributedType.DEEPSPEED,) if self.uses_deepspeed else plain):
            asked = "DeepSpeed" if self.uses_deepspeed else "plain data parallelism"
            raise TubeletError(f"accelerate believes in {believed.value} although {asked} was asked for")
        if self.accelerator.gradient_accumulation_steps != accumulation:
            raise Refused(
                f"data.micro_batch: makes {accumulation} micro-batches a step, but accelerate was told "
                f"{self.accelerator.gradient_accumulation_steps}; unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
            )

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

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of a tensor over all processes, on the device and without waiting for it."""
        return self.accelerator.reduce(values, reduction="sum")

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
        result: Result | None = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = action()
            except Exception as raised:
                error = raised
        failure = self.gather_objects(told_by_main(error) if error else None)[0]
        if failure is not None:
            raise error or failure
        return result

    def on_main_patiently(self, action: Callable[[], Result]) -> Result | None:
        """Does what `on_main_only` does, for what takes longer than a message between processes may wait."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            future = pool.submit(action) if self.is_main else None
            while not self.gather_objects(future is None or _is_over(future))[0]:
                pass
            return self.on_main_only(lambda: future.result() if future else None)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Wraps model and optimiser for this world; `TubeletError` if DeepSpeed sees another or the network fails."""
        with network_told():  # NCCL first speaks here
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
        self.accelerator.free_memory()
        self._leave()

    def _leave(self) -> None:
        from accelerate.state import AcceleratorState, GradientState

        self._store = None
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if torch.distributed.is_initialized() and self.uses_deepspeed:
            import deepspeed.comm

            deepspeed.comm.destroy_process_group()  # and what DeepSpeed keeps of it
        elif torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self._restore_environment()

    def _restore_environment(self) -> None:
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _is_over(future: Future) -> bool:
    """Waits a while for the end of a piece of work; returns whether it has come."""
    wait([future], timeout=PATIENCE_S)
    return future.done()


def _message_group() -> torch.distributed.ProcessGroup:
    with network_told():
        group = torch.distributed.new_group(backend="gloo")
    assert isinstance(group, torch.distributed.ProcessGroup), "every rank is a member"
    return group


def launched_rank() -> int:
    """Returns which of the processes this one is to the launcher; known before any process group exists."""
    return int(_launched("RANK", "0"))


def launched_world() -> int:
    """Returns how many processes the launcher started."""
    return int(_launched("WORLD_SIZE", "1"))


def first_host(nodes: str) -> str:
    """Returns the first host of SLURM's list of nodes: node03 of `node[03-05,9],other1`."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _launched(name: str, alone: str) -> str:
    return os.environ[SRUN_VARIABLES[name]] if _started_by_srun() else os.environ.get(name, alone)


def _started_by_srun() -> bool:
    """Whether this is one of several tasks of srun, and no other launcher stands between."""
    return "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def address_of(node: str) -> str:
    """Returns a node's name where it resolves, else the address by which SLURM reaches it.

    Raises:
        Refused: Nobody knows one.
    """
    try:
        socket.getaddrinfo(node, None)
    except socket.gaierror:
        told = re.search(r"\bNodeAddr=(\S+)", _asked_scontrol("show", "node", node, "--oneliner"))
        if told is None or told[1] == node:
            raise Refused(
                f"srun: the first node, {node}, resolves to no address; set MASTER_ADDR to one that all nodes reach"
            ) from None
        return told[1]
    return node


def _asked_scontrol(*arguments: str) -> str:
    """Returns what scontrol tells; nothing where it is missing, as in a container, or does not answer."""
    command = ["scontrol", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _describe_srun() -> None:
    """Says what srun's variables tell in those of the other launchers.

    Jobs that share a node get ports by their numbers; a requeued attempt gets another, lest it meets again what had
    taken the one before.
    """
    try:
        told = {name: os.environ[variable] for name, variable in SRUN_VARIABLES.items()}
        nodes = os.environ["SLURM_STEP_NODELIST"]
        number = int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
        number += 997 * int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    except (KeyError, ValueError) as error:
        raise Refused(f"srun: started several tasks without telling {error}; start one torchrun on each node") from None
    told["MASTER_ADDR"] = os.environ.get("MASTER_ADDR") or address_of(first_host(nodes))
    told["MASTER_PORT"] = os.environ.get("MASTER_PORT") or str(SRUN_PORTS[number % len(SRUN_PORTS)])
    if told["RANK"] == "0":
        _require_free(int(told["MASTER_PORT"]), is_given=bool(os.environ.get("MASTER_PORT")))
    os.environ.update(told | {name: os.environ[name] for name in told if os.environ.get(name)})


def _require_free(port: int, is_given: bool) -> None:
    """Raises an error where another program of this node listens on the port at which the ranks are to meet.

    The batch script does not start a refused job again. So only a port that somebody set is refused; one that follows
    from the job's numbers is another in the next attempt.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            place = f"MASTER_PORT: {port} on {host_name()} cannot be used ({error.strerror})"
            if is_given:
                raise Refused(f"{place}; set it to a free one") from None
            raise TubeletError(f"{place}; the job's next attempt takes another, or set it to a free one") from None


def _refuse_plugins(allowed: str | None) -> None:
    for name in PLUGIN_VARIABLES:
        if name != allowed and os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            raise Refused(
                f"{name}: is set, and would divide the work in accelerate's way; unset it, or use --deepspeed"
            )


def _describe_single_process() -> None:
    """DeepSpeed reads a launcher's variables; a plain `python -m pretrain` has none."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def _spare_compiler() -> None:
    """On CPU, DeepSpeed compiles a kernel that speaks through shared memory, whose ranks spin when one is killed."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
