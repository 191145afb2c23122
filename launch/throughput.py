"""Where `tubelet estimate` has clips per second from: a run that was, or some steps on this machine; nowhere else."""

import dataclasses
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from launch.trained_model import TrainedModel
from pretrain.commandline import to_dict
from pretrain.config import RunConfig
from pretrain.engine.compiler import refuse_without_compiler
from pretrain.engine.distributed import Processes
from pretrain.engine.environment import ENVIRONMENT
from pretrain.engine.feeding import on_device
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.run import SUMMARY
from pretrain.engine.step_figures import memory_gib
from pretrain.errors import Refused
from pretrain.model.blocks import recompute_activations
from pretrain.weights import configs_from, load_model_folder

STEPS = 5
"""Steps that are timed after a first one that is not; their median counts."""
MUST_BE_ALIKE = ("decoder", "mask", "head", "data.clip.frames", "data.clip.size", "data.packing")
"""Fields that make the work of a clip, beside the encoder's architecture."""
MAY_DIFFER = ("precision", "data.micro_batch", "data.repeats", "deepspeed", "compile", "activation_checkpointing")
"""Fields that change the speed of the same work."""


class Throughput(NamedTuple):
    """How fast a model is trained.

    Attributes:
        clips_per_second: Of one process, which is one GPU.
        source: Where the figure is from, and what is taken for granted when it is used for another world.
        peak_gib: The greatest memory of that process, where it was measured here.
    """

    clips_per_second: float
    source: str
    peak_gib: float | None = None


def given(clips_per_second: float) -> Throughput:
    """Returns what the command line says; raises `Refused` if that cannot be."""
    if not 0 < clips_per_second < float("inf"):
        raise Refused(f"--throughput: {clips_per_second} clips per second and GPU must be greater than 0")
    return Throughput(clips_per_second, "--throughput")


def of_run(folder: Path, config: RunConfig, trained: TrainedModel) -> Throughput:
    """Returns how fast a finished run trained the same model.

    Args:
        folder: The run's folder.
        config: The configuration of the run to come.
        trained: Its model.

    Raises:
        Refused: The folder holds no finished run, or that of another model.
    """
    summary = _read(folder / SUMMARY, json.loads)
    before = _read(folder / "config.yaml", yaml.safe_load)
    try:
        speed, world = float(summary["clips_per_second"]), int(summary["world"])
    except (KeyError, TypeError, ValueError):
        raise Refused(
            f"--from: {folder / SUMMARY} tells no clips per second of a number of processes; take another run, or give "
            f"--throughput"
        ) from None
    _refuse_other_work(folder, before, config, trained)
    worlds = _worlds_of(folder)
    if len(worlds) > 1:
        raise Refused(
            f"--from: {folder} ran in {' and '.join(map(str, sorted(worlds)))} processes by turns, so nobody knows how "
            f"fast one is; take another run, or give --throughput"
        )
    now = to_dict(config)
    changed = [
        f"{name} {_value(before, name)} there, {_value(now, name)} here"
        for name in MAY_DIFFER
        if _value(before, name) != _value(now, name)
    ]
    but_for = f", although it had other settings ({'; '.join(changed)})" if changed else ""
    source = (
        f"{folder}, {speed:.4g} clips/s in {world} process{'' if world == 1 else 'es'}, taken to be the same for each "
        f"of any number of GPUs of that kind{but_for}"
    )
    return Throughput(speed / world, source)


def _worlds_of(folder: Path) -> set[int]:
    """Returns in how many processes the attempts of a run ran, as far as the run tells."""
    path = folder / ENVIRONMENT
    return {json.loads(line)["world"] for line in path.read_text().splitlines()} if path.exists() else set()


def measured(config: RunConfig, trained: TrainedModel) -> Throughput:
    """Times training steps of one micro-batch on this machine, without DeepSpeed, without reading any data.

    Raises:
        Refused: The device cannot compute in the configured precision, a micro-batch does not fit, or there is no
            compiler for a model that shall be compiled.
    """
    if config.compile:
        refuse_without_compiler()
    try:
        return _timed(config, trained)
    except torch.OutOfMemoryError:
        raise Refused(
            f"--measure: data.micro_batch {config.data.micro_batch} does not fit in this GPU; lower it, or use "
            f"--activation_checkpointing true"
        ) from None


def _timed(config: RunConfig, trained: TrainedModel) -> Throughput:
    with Processes(config.precision, 1, config.data.micro_batch, config.optimizer.clip_grad) as processes:
        model = trained.build()
        if config.activation_checkpointing:
            recompute_activations(model)
        if config.compile:
            model.compile()
        model, optimizer = processes.prepare(model, build_optimizer(model, config.optimizer, config.data.global_batch))
        (batch,) = on_device([trained.batch(config.data.micro_batch)], processes.device)
        seconds = []
        for _ in range(1 + STEPS):
            started = time.perf_counter()
            processes.accelerator.backward(trained.loss(model, batch))
            optimizer.step()
            optimizer.zero_grad()
            if processes.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        if processes.device.type == "cuda":
            name, peak = torch.cuda.get_device_name(), memory_gib(processes.device)
        else:
            name, peak = f"the CPU ({platform.machine()}, {torch.get_num_threads()} threads)", None
    clips = config.data.micro_batch * config.data.repeats
    speed = clips / statistics.median(seconds[1:])
    source = (
        f"{STEPS} steps of {clips} clips here on {name}, without reading data, DeepSpeed and other processes, "
        f"which make it slower"
    )
    return Throughput(speed, source, peak)


def _read(path: Path, parse: Any) -> dict[str, Any]:
    try:
        content = parse(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise Refused(f"--from: {path} is missing or unreadable; give the folder of a finished run, or --throughput")
    return content


def _refuse_other_work(folder: Path, before: dict[str, Any], config: RunConfig, trained: TrainedModel) -> None:
    exported = next((folder / name for name in ("encoder", "model") if (folder / name).is_dir()), folder / "encoder")
    architecture, _ = configs_from(load_model_folder(exported)[1], exported)
    there, here = (
        to_dict(dataclasses.replace(one.resolved(), drop_path=0.0)) for one in (architecture, trained.architecture)
    )
    changed = [name for name in here if there[name] != here[name]]
    field = "encoder" if "decoder" in before else "architecture"
    others = [f"{field}.{name}" for name in changed]
    now = to_dict(config)
    others += [name for name in MUST_BE_ALIKE if _value(before, name) != _value(now, name)]
    if others:
        raise Refused(
            f"--from: {folder} trained another model than this ({', '.join(others)} differ); take a run of the same, "
            f"or give --throughput"
        )


def _value(content: dict[str, Any], name: str) -> Any:
    """Returns a field of nested dictionaries by its full name; None where it is not there."""
    found: Any = content
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found
