"""`tubelet launch local`: a run on all GPUs of this machine, or in several processes on its CPU, by torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from launch.inner import Inner, checked_chain
from pretrain.errors import EXIT_FAILED, Refused, TubeletError


class LocalRunEnded(TubeletError):
    """A run on this machine ended before it was done; its ranks have told why."""

    def __init__(self, inner: Inner, code: int) -> None:
        """Takes the command and the exit code to end with."""
        goes_on = "" if inner.name == "doctor" else "; the same command goes on"
        super().__init__(f"{inner.name}: ended with exit code {code}, see above{goes_on}")
        self.exit_code = code


def launch_local(chain: list[Inner], gpus: int | None, processes: int | None) -> None:
    """Runs one command after the other, each in as many processes as there are GPUs or as asked for.

    Args:
        chain: The commands.
        gpus: GPUs to use, one process on each; None uses all.
        processes: Processes on the CPU instead.

    Raises:
        Refused: The machine has not so many GPUs, or a command cannot run; nothing was started.
        LocalRunEnded: A command did not come to its end.
    """
    world = _world(gpus, processes)
    if any(inner.name == "pack" for inner in chain):
        raise Refused("launch: pack uses all cores of a machine by itself; run tubelet pack, with --jobs N")
    chain = checked_chain(chain, [world] * len(chain), on_cpu=processes is not None)
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if processes else {})
    for inner in chain:
        code = _run(inner, world, environment)
        if code:
            raise LocalRunEnded(inner, code)


def _world(gpus: int | None, processes: int | None) -> int:
    import torch

    if gpus is not None and processes is not None:
        raise Refused("gpus, processes: give one of them; processes run on the CPU")
    for name, number in (("gpus", gpus), ("processes", processes)):
        if number is not None and number < 1:
            raise Refused(f"{name}: {number} must be at least 1")
    if processes is not None:
        return processes
    there = torch.cuda.device_count()
    if not there:
        raise Refused("gpus: this machine has none; give --processes N to train on its CPU")
    if gpus is not None and gpus > there:
        raise Refused(f"gpus: {gpus} are asked for, but this machine has {there}; ask for fewer")
    return gpus or there


def _run(inner: Inner, world: int, environment: dict[str, str]) -> int:
    """Runs a command under torchrun; returns the run's exit code."""
    started = time.time()
    command = [sys.executable, "-m", "launch.torchrun", "--standalone", "--nproc-per-node", str(world)]
    process = subprocess.Popen([*command, *_module(inner), *inner.arguments], env=environment)

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        code = _wait(process)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if not code:
        return 0
    outcome = Path(inner.out) / "outcome.json"
    if outcome.exists() and outcome.stat().st_mtime >= started:
        return int(json.loads(outcome.read_text())["exit_code"]) or EXIT_FAILED
    return code if code > 0 else EXIT_FAILED


def _module(inner: Inner) -> list[str]:
    """Returns what torchrun starts: a run's own module, or the command."""
    return ["-m", inner.name] if inner.name in ("pretrain", "finetune") else ["-m", "launch", inner.name]


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Waits for a process that Ctrl-C reaches as well."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
