"""Starts real runs in processes of their own that can be killed, without paying for imports each time.

A template process imports everything once and forks a child, in a session of its own, for each rank of a run. The child
does what `python -m pretrain` (or finetune, or launch) does, with the variables that torchrun would set.
"""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 120

TEMPLATE = """
import gc, importlib, json, os, signal, sys, time
gc.disable()
os.environ["DS_ACCELERATOR"] = "cpu"
import accelerate, decord, deepspeed, deepspeed.runtime.zero.muon.original_muon, deepspeed.runtime.zero.stage3
import finetune.finetuning, finetune.predict, launch.cli, matplotlib.backends.backend_svg, pretrain.pretraining, torch
import scipy.stats, torchmetrics.functional.classification
import torch.distributed.checkpoint.staging
from accelerate.utils import DeepSpeedPlugin
gc.freeze()  # or each collection in a child copies all that was imported
gc.enable()

def child(order):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["environment"])
    os.chdir(order["place"])
    sys.path[:0] = order["path"]
    if order["limit_bytes"]:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit_bytes"],) * 2)
    if order["sync_s"]:
        sync = os.fsync
        os.fsync = lambda descriptor: (time.sleep(order["sync_s"]), sync(descriptor))
    if order["kill_at"] is not None:
        import pathlib, tests.drills.kill_points
        tests.drills.kill_points.install(order["kill_at"], pathlib.Path(order["output"]).with_suffix(".operations"))
    module = importlib.import_module({"launch": "launch.cli"}.get(order["module"], order["module"] + ".__main__"))
    sys.exit(module.main(order["arguments"]))

print("ready", flush=True)
while line := sys.stdin.readline():
    order = json.loads(line)
    if "poll" in order:
        done, status = os.waitpid(order["poll"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if done else None
    else:
        answer = os.fork()
        if not answer:
            child(order)
    print(json.dumps(answer), flush=True)
"""


class Started:
    """A run that was started: one process for each rank."""

    def __init__(self, pids: list[int], outputs: list[Path]) -> None:
        """Takes the processes' ids and the files that they write to."""
        self.pids = pids
        self.outputs = outputs
        self.codes: list[int | None] = [None] * len(pids)

    def is_over(self) -> bool:
        """Whether all ranks have ended."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                self.codes[rank] = _ask({"poll": pid})
        return None not in self.codes

    def wait(self) -> "Started":
        """Waits until all ranks have ended; as a launcher does, ends the others when one fails."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.is_over():
            if time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"a run did not end within {TIMEOUT_S} s:\n{self.text}")
            if any(code not in (None, 0) for code in self.codes) and time.monotonic() < deadline - 10:
                deadline = time.monotonic() + 10
            time.sleep(0.02)
        return self

    def kill(self, how: int = signal.SIGKILL) -> None:
        """Sends a signal to the process groups of all ranks at once."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                os.killpg(pid, how)
        if how == signal.SIGKILL:
            while not self.is_over():
                time.sleep(0.01)

    def wait_for(self, condition: Any) -> bool:
        """Waits until a condition holds; returns False if the run ended before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if self.is_over():
                return False
            if time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"a run came to nothing within {TIMEOUT_S} s:\n{self.text}")
            time.sleep(0.005)
        return True

    @property
    def code(self) -> int | None:
        """The exit code of rank 0."""
        return self.codes[0]

    @property
    def text(self) -> str:
        """What rank 0 wrote to standard output and standard error."""
        return self.outputs[0].read_text()


def start(
    module: str,
    arguments: Sequence[object],
    folder: Path,
    world: int = 1,
    environment: dict[str, str] | None = None,
    limit_bytes: int = 0,
    sync_s: float = 0,
    kill_at: int | None = None,
    last: dict[str, Any] | None = None,
) -> Started:
    """Starts `python -m MODULE ARGUMENTS` in `world` processes.

    Args:
        module: pretrain, finetune or launch.
        arguments: The command line.
        folder: Takes the files with the processes' output.
        world: Number of processes.
        environment: More variables.
        limit_bytes: Largest file that the processes may write; 0 for no limit.
        sync_s: Seconds that a slow disk takes to write a file through.
        kill_at: At which of the file operations of its saves rank 0 kills itself, 0 for never; None watches none.
        last: How the last rank is started in another way: `arguments` that follow, the `place` it starts in, a `path`
            that Python looks in first.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    pids, outputs = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(world):
        output = folder / f"output-{time.monotonic_ns()}-{rank}.txt"
        ranked = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
        other = (last or {}) if rank == world - 1 else {}
        order = {
            "module": module,
            "arguments": [str(argument) for argument in (*arguments, *other.get("arguments", ()))],
            "place": str(other.get("place", Path.cwd())),
            "path": [str(other["path"])] if "path" in other else [],
            "environment": (ranked if world > 1 else {}) | (environment or {}),
            "output": str(output),
            "limit_bytes": limit_bytes,
            "sync_s": sync_s,
            "kill_at": kill_at if rank == 0 else None,
        }
        output.touch()
        pids.append(_ask(order))
        outputs.append(output)
    return Started(pids, outputs)


def run(module: str, arguments: Sequence[object], folder: Path, **options: Any) -> Started:
    """Starts a run and waits for its end."""
    return start(module, arguments, folder, **options).wait()


def run_python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process that knows of no W&B key but the given one."""
    inherited = {name: value for name, value in own_environment().items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env=inherited | {"HOME": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def free_port() -> int:
    """Returns a TCP port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def own_environment() -> dict[str, str]:
    """Returns this process's variables for a child that imports Tubelet."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def _ask(order: dict[str, Any]) -> Any:
    template = _template()
    template.stdin.write(json.dumps(order) + "\n")
    template.stdin.flush()
    return json.loads(template.stdout.readline())


@functools.cache
def _template() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", TEMPLATE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=own_environment(),
        text=True,
    )
    atexit.register(process.kill)
    while (line := process.stdout.readline()) != "ready\n":  # libraries announce themselves
        assert line, "the template process died"
    return process


TINY = """
precision: fp32
log_every: 1
tracking: none
data:
  global_batch: 4
  micro_batch: 2
  lanes: 2
  shards_per_window: 2
  workers: 0
  clip: {frames: 4, stride: 1, size: 16}
optimizer: {base_lr: 6.4e-2, base_min_lr: 6.4e-4, warmup_steps: 3}
"""

TINY_ENCODER = "{width: 32, depth: 1, heads: 2, tubelet: [2, 8, 8], drop_path: 0.2}"


def tiny_pretraining(folder: Path, shards: Path) -> Path:
    """Writes the recipe of a pretraining run that takes milliseconds a step."""
    path = folder / "tiny.yaml"
    path.write_text(
        TINY.replace("data:", f"data:\n  shards: {shards}")
        + f"encoder: {TINY_ENCODER}\ndecoder: {{width: 16, depth: 1, heads: 2}}\nmask: {{name: random, ratio: 0.5}}\n"
    )
    return path
