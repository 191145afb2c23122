"""What `tubelet doctor` looks at, one function a check; each is called on every rank and tells what it found there.

A check raises what it would be refused for; `doctor.py` turns that into a line. Checks that talk to other ranks find
the same on all of them, so that no rank waits for one that has given up.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch

from launch.inner import refuse_missing_weights
from pretrain.agreement import SAME_DATA, fingerprints
from pretrain.config import PretrainConfig
from pretrain.data.balanced import SampleOrder
from pretrain.data.loader import PREFETCHED_BATCHES
from pretrain.data.reading_check import check_decoder, describe_sets, read_one_sample
from pretrain.data.shards import ShardSet
from pretrain.engine.all_reduce import measure_all_reduce
from pretrain.engine.checkpoint_search import step_folders
from pretrain.engine.checkpoint_size import checkpoint_bytes_of, kept_checkpoints
from pretrain.engine.compiler import refuse_divided_weights, refuse_without_compiler
from pretrain.engine.deepspeed_file import read_deepspeed
from pretrain.engine.devices import device_here, host_name
from pretrain.engine.distributed import Processes
from pretrain.engine.preflight import Same, differences, problems_of_folder, versions_here
from pretrain.engine.run import CHECKPOINTS
from pretrain.engine.tracking import choose_connection
from pretrain.engine.wandb_server import server_url, unreachable_because
from pretrain.errors import DiskFull, Refused, TubeletError
from pretrain.identity import refuse_other_run
from pretrain.pretraining import build_autoencoder, trained_fields
from pretrain.sets import open_run_sets
from pretrain.stage import order_of

TOLD_VERSIONS = ("tubelet", "Python", "torch", "accelerate", "deepspeed", "timm", "webdataset", "av")
SHARED_MEMORY = Path("/dev/shm")
NVIDIA_DEVICES = "nvidia[0-9]*"

Status = Literal["ok", "warning", "failed", "not checked"]


class Finding(NamedTuple):
    """What a check found on a rank, with the remedy where something is wrong."""

    status: Status
    text: str


@dataclasses.dataclass
class Patient:
    """What is looked at.

    Attributes:
        config: The configuration.
        processes: All processes.
        sets: The shards, once they are open.
        order: The order of their samples, once they are open.
        steps: Length of the run, once it is known.
    """

    config: PretrainConfig
    processes: Processes
    sets: tuple[ShardSet, ...] = ()
    order: SampleOrder | None = None
    steps: int | None = None

    @property
    def has_data(self) -> bool:
        """Whether the configuration names shards."""
        return bool(self.config.data.shards or self.config.data.mixture)

    @property
    def has_length(self) -> bool:
        """Whether the configuration is that of a run, and not only some fields."""
        return self.config.steps is not None or self.config.epochs is not None


def configuration(patient: Patient) -> Finding:
    """Whether the run's configuration can be, on so many processes."""
    config, world = patient.config, patient.processes.world
    if not patient.has_length:
        return Finding("not checked", "give --config NAME, or --steps N, as for tubelet pretrain")
    if not patient.has_data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, shards="to be named"))
    config.validate()
    accumulation = config.accumulation(world)
    file = config.deepspeed_file
    if file:
        read_deepspeed(file)
        if config.compile:
            refuse_divided_weights(file)
    if config.compile:
        refuse_without_compiler()
    refuse_missing_weights(config)
    data = config.data
    return Finding(
        "ok",
        f"{data.global_batch} samples a step: processes {world} x micro-batches {accumulation} x samples "
        f"{data.micro_batch}",
    )


def versions(patient: Patient) -> Finding:
    """Whether all ranks run the same."""
    own = versions_here()
    gathered = patient.processes.gather_objects((host_name(), own))
    problems = differences([(one,) for _, one in gathered], [host for host, _ in gathered])
    if problems:
        return Finding("failed", problems[0])
    return Finding("ok", ", ".join(f"{name} {own.values[name]}" for name in TOLD_VERSIONS))


def devices(patient: Patient) -> Finding:
    """Whether this rank's device can do what is asked for, and whether its node has GPUs that torch does not see."""
    precision = patient.config.precision
    here = device_here(precision)
    if here.problem and here.kind == "cpu" and _on_login_node():
        return Finding("warning", f"{here.problem}; no matter if the run goes to nodes with GPUs: launch doctor there")
    if here.problem:
        raise Refused(here.problem)
    if here.kind == "cpu":
        hidden = sorted(path.name for path in Path("/dev").glob(NVIDIA_DEVICES))
        if hidden and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            raise TubeletError(
                f"torch {torch.__version__} sees no GPU, but the node has {', '.join(hidden)}; see whether nvidia-smi "
                f"works and its driver is new enough for CUDA {torch.version.cuda}"
            )
        threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
        memory = psutil.virtual_memory().total / 2**30
        return Finding("ok", f"CPU, {cores} cores, {threads} threads, {memory:.0f} GiB, for {precision}")
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(patient.processes.device))
    text = f"{here.name}, {total:.0f} GiB, for {precision}"
    if free < total / 2:
        return Finding("warning", f"{text}; only {free:.0f} GiB are free: nvidia-smi tells who has the rest")
    return Finding("ok", text)


def _on_login_node() -> bool:
    return shutil.which("sbatch") is not None and "SLURM_JOB_ID" not in os.environ


def all_reduce(patient: Patient) -> Finding:
    """Whether the ranks sum a tensor together, and how fast."""
    if patient.processes.world == 1:
        return Finding("not checked", "one process; start it on all nodes with tubelet launch ... -- doctor")
    found = measure_all_reduce(patient.processes)
    return Finding(
        "ok",
        f"{found.backend}, the sum is right, {found.latency_s * 1e6:.0f} us for one number, "
        f"{found.bytes_per_second / 1e9:.2f} GB/s for {found.payload_bytes >> 20} MiB",
    )


def run_folder(patient: Patient) -> Finding:
    """Whether all ranks see and write to the run's folder; one that was missing is not left behind."""
    folder = Path(patient.config.out)
    problems = problems_of_folder(patient.processes, folder, keep=False)
    if problems:
        return Finding("failed", "; ".join(problems))
    return Finding("ok", f"{folder.resolve()} can be written{' and all see it' * (patient.processes.world > 1)}")


def disk(patient: Patient) -> Finding | None:
    """Whether there is room for the run's checkpoints; rank 0 looks."""
    if not patient.processes.is_main:
        return None
    folder = Path(patient.config.out).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if not patient.has_length:
        return Finding("ok", f"{free / 2**30:.1f} GiB are free")
    config = patient.config
    with torch.device("meta"):
        one = checkpoint_bytes_of(build_autoencoder(config), config.precision, config.deepspeed_file)
    steps = patient.steps or config.steps
    stay = kept_checkpoints(steps, config.checkpoint).most if steps else config.checkpoint.keep_last + 1
    text = f"{free / 2**30:.1f} GiB are free, a checkpoint takes about {one / 2**30:.2f} GiB"
    if free < one:
        raise DiskFull(f"{folder}: {text}; free some or give another --out")
    if free < one * stay:
        return Finding("warning", f"{text} and up to {stay} are there at a time; free some unless some are there now")
    return Finding("ok", f"{text}, up to {stay} at a time")


def checkpoints(patient: Patient) -> Finding | None:
    """Whether the run would go on from what its folder holds, or start in an empty one; rank 0 looks."""
    if not patient.processes.is_main:
        return None
    config = patient.config
    if patient.order is None or not patient.has_length:
        return Finding("not checked", "give --config NAME and --data.shards SHARDS, which can be read")
    refuse_other_run(config, "pretrain", patient.order, patient.sets, trained_fields(config))
    there = step_folders(Path(config.out) / CHECKPOINTS)
    return Finding("ok", f"{there[-1]} is the newest, of this very run" if there else "there are none yet")


def shared_memory(patient: Patient) -> Finding:
    """Whether the loader's batches find room in shared memory, of which containers often have little."""
    data, clip = patient.config.data, patient.config.data.clip
    ranks = patient.processes.gather_objects(host_name()).count(host_name())
    if not data.workers or data.packing or not SHARED_MEMORY.is_dir():
        return Finding("not checked", "no batches of known size pass through it")
    clips = data.workers * PREFETCHED_BATCHES * data.micro_batch * data.repeats
    needed = ranks * clips * clip.frames * clip.size**2 * 3
    free = shutil.disk_usage(SHARED_MEMORY).free
    text = f"{free / 2**30:.1f} GiB are free in {SHARED_MEMORY}, batches take up to {needed / 2**30:.2f} GiB"
    if free < needed:
        return Finding("warning", f"{text}; give the container more (docker --shm-size), or fewer data.workers")
    return Finding("ok", text)


def decoder(patient: Patient) -> Finding:
    """Whether a video can be decoded."""
    check_decoder(patient.config.data.decoder)
    return Finding("ok", f"{patient.config.data.decoder} decodes")


def shards(patient: Patient) -> Finding:
    """Whether this rank reads the shards, and the same ones as the others."""
    if not patient.has_data:
        return Finding("not checked", "give --data.shards SHARDS")
    processes, data = patient.processes, patient.config.data
    error: Exception | None = None
    same, text = Same({}, SAME_DATA), ""
    try:
        sets = open_run_sets(patient.config)
        patient.sets = sets.training
        opened = [*sets.training, *([sets.held_out] if sets.held_out else [])]
        order = patient.order = order_of(patient.config, *patient.sets)
        if patient.has_length:
            patient.steps = patient.config.total_steps(order.steps_per_epoch)
        read = [read_one_sample(one, data.decoder, processes.rank, processes.world) for one in opened]
        same = Same(fingerprints("data.shards, validation.shards", *opened), SAME_DATA)
        text = f"{describe_sets(opened)}; {read[0]}"
    except Exception as raised:  # whatever it is, the others must not wait for this rank
        error = raised
    gathered = processes.gather_objects((host_name(), None if error else same))
    if error:
        raise error
    if all(one is not None for _, one in gathered):
        problems = differences([(one,) for _, one in gathered], [host for host, _ in gathered])
        if problems:
            return Finding("failed", problems[0])
    return Finding("ok", text)


def wandb(patient: Patient) -> Finding | None:
    """Whether W&B can be reached from rank 0, where it is wanted online."""
    if not patient.processes.is_main:
        return None
    connection = choose_connection(patient.config.tracking, os.environ)
    if connection is None:
        return Finding("ok", "not used: there is no key, or --tracking none; metrics.jsonl holds everything")
    if connection == "offline":
        return Finding("ok", "offline; `wandb sync` uploads a run later")
    reason = unreachable_because()
    if reason:
        remedy = (
            "runs are kept offline until then: `wandb sync` uploads them; WANDB_MODE=offline says so from the start"
        )
        return Finding("warning", f"{server_url()} cannot be reached ({reason}); {remedy}")
    return Finding("ok", f"{server_url()} answers")


CHECKS: dict[str, Callable[[Patient], Finding | None]] = {
    "configuration": configuration,
    "versions": versions,
    "devices": devices,
    "all-reduce": all_reduce,
    "run folder": run_folder,
    "shared memory": shared_memory,
    "decoder": decoder,
    "shards": shards,
    "checkpoints": checkpoints,
    "disk": disk,
    "W&B": wandb,
}
"""All checks by their names, in the order in which they are made; the shards tell how long the run is."""
