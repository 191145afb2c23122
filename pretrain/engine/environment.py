"""What an attempt runs on: the code and its state in git, versions, hosts and devices, the job, the command, variables.

Each attempt adds a line to `environment.jsonl` in the run folder and shows it in W&B, so that a result can be traced to
what made it, also where a requeued job went on with other nodes or other code. Only variables that are known to matter
are taken, and secrets are removed from all texts (`redaction.py`).
"""

import functools
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from pretrain.engine.devices import host_name
from pretrain.engine.redaction import arguments_without_secrets, is_secret_name, without_secrets
from pretrain.engine.versions import installed_versions, version_of
from pretrain.files import write_text

logger = logging.getLogger(__name__)

ENVIRONMENT = "environment.jsonl"
TAKEN = (
    *(
        "SLURM_",
        "TUBELET_",
        "ACCELERATE_",
        "DEEPSPEED_",
        "DS_",
        "TORCH_",
        "TORCHELASTIC_",
        "TORCHINDUCTOR_",
        "PYTORCH_",
    ),
    *("CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "MKL_", "OPENBLAS_", "HIP_", "ROCR_", "TRITON_"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUBLAS_WORKSPACE_CONFIG"),
    *("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL", "CONDA_DEFAULT_ENV", "VIRTUAL_ENV"),
    *("APPTAINER_CONTAINER", "APPTAINER_NAME", "SINGULARITY_CONTAINER", "HF_HUB_OFFLINE", "PYTHONHASHSEED"),
)
"""Variables that are noted: these, and those that begin so where a name ends in `_`."""
PATIENCE_S = 10.0
"""How long the state of the code may take to be told, all questions to git together."""
DIFFERING_FILES = 50
"""Files with changes that are listed; of more only the sum is told."""


def describe_rank(rank: int, device: torch.device) -> dict[str, Any]:
    """Returns where a rank runs: its host, its device, and the CPU cores that it may use."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"
    return {"rank": rank, "host": host_name(), "device": name, "cpus": len(os.sched_getaffinity(0))}


def describe_attempt(
    attempt: int,
    first_step: int,
    ranks: list[dict[str, Any]],
    environment: Mapping[str, str] | None = None,
    arguments: list[str] | None = None,
) -> dict[str, Any]:
    """Returns what an attempt runs on; what cannot be told is left out with a warning, and never ends the run.

    Args:
        attempt: Its number.
        first_step: The step from which it goes on.
        ranks: What `describe_rank` tells of each rank.
        environment: Variables; by default this process's.
        arguments: The command line; by default this process's.
    """
    variables = dict(os.environ if environment is None else environment)
    parts: dict[str, Callable[[], Any]] = {
        "started": lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": lambda: arguments_without_secrets(sys.orig_argv if arguments is None else arguments, variables),
        "folder": os.getcwd,
        "launcher": lambda: launcher_of(variables),
        "job": lambda: variables.get("SLURM_JOB_ID"),
        "world": lambda: len(ranks),
        "hosts": lambda: _hosts_of(ranks),
        "code": lambda: _in_time(lambda: describe_code(Path(__file__).parents[2])),
        "versions": _versions,
        "system": platform.platform,
        "variables": lambda: {name: value for name, value in sorted(variables.items()) if _is_noted(name)},
    }
    report: dict[str, Any] = {"attempt": attempt, "step": first_step}
    missing = []
    for name, tell in parts.items():
        try:
            report[name] = without_secrets(tell(), variables)
        except Exception as error:  # whatever it is, a run does not end because it cannot describe itself
            missing.append(f"{name} ({' '.join(f'{type(error).__name__} {error}'.split())})")
    if missing:
        logger.warning("%s: cannot tell %s of this attempt; it goes on without", ENVIRONMENT, ", ".join(missing))
    return report


def _in_time(action: Callable[[], Any]) -> Any:
    """Returns what an action returns, or raises that it took too long: a file system that hangs holds its thread."""
    future: Future[Any] = Future()

    def act() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=act, daemon=True).start()
    try:
        return future.result(timeout=PATIENCE_S)
    except TimeoutError:
        raise TimeoutError(f"no answer within {PATIENCE_S:g} s") from None


def note_attempt(out: Path, report: dict[str, Any]) -> None:
    """Adds the report of an attempt to those in the run folder."""
    path = out / ENVIRONMENT
    before = path.read_text(errors="replace").splitlines() if path.exists() else []
    write_text(path, "".join(line + "\n" for line in [*before, json.dumps(report)]))


def launcher_of(variables: Mapping[str, str]) -> str:
    """Returns what started the processes: srun, torchrun, accelerate, deepspeed, or python itself."""
    if "TORCHELASTIC_RUN_ID" in variables:
        return "accelerate" if "ACCELERATE_MIXED_PRECISION" in variables else "torchrun"
    if "CROSS_SIZE" in variables:
        return "deepspeed"
    return "srun" if "SLURM_STEP_ID" in variables else "python"


@functools.cache
def describe_code(folder: Path) -> dict[str, Any]:
    """Returns the state in git of the code in a folder, or what is known of it where it is not under git.

    The addresses of remotes are left out: they may hold credentials.
    """
    tracked, error = _ask_git(folder, "ls-files", "--error-unmatch", "pretrain/__init__.py")
    if tracked is None:
        told = f"installed, not a checkout of git ({folder})" if not (folder / ".git").exists() else error
        return {"source": told, "version": version_of("tubelet"), "commit": _installed_commit()}
    changes, _ = _ask_git(folder, "diff", "--stat=200", f"--stat-count={DIFFERING_FILES}", "HEAD")
    untracked, _ = _ask_git(folder, "ls-files", "--others", "--directory", "--exclude-standard")
    return {
        "source": f"a checkout of git ({folder})",
        "version": version_of("tubelet"),
        "commit": (_ask_git(folder, "rev-parse", "HEAD")[0] or "").strip() or None,
        "branch": (_ask_git(folder, "rev-parse", "--abbrev-ref", "HEAD")[0] or "").strip() or None,
        "changed": None if changes is None else bool(changes),
        "changes": (changes or "").splitlines(),
        "untracked": (untracked or "").splitlines()[:DIFFERING_FILES],
    }


def _ask_git(folder: Path, *command: str) -> tuple[str | None, str]:
    """Returns what git answers, or None and why it does not."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command],
            env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_S,  # when nobody waits for it any more
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"git does not answer ({error})"
    return (done.stdout, "") if done.returncode == 0 else (None, " ".join(done.stderr.split()))


def _installed_commit() -> str | None:
    """Returns the commit that pip noted where it installed Tubelet from a repository."""
    try:
        noted = importlib.metadata.distribution("tubelet").read_text("direct_url.json")
        return json.loads(noted or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        return None


def _versions() -> dict[str, str]:
    versions = installed_versions()
    if torch.cuda.is_available():
        versions |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    return versions


def _hosts_of(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one entry for each host, in the order of the ranks."""
    hosts: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        host = hosts.setdefault(rank["host"], {"host": rank["host"], "ranks": [], "devices": [], "cpus": []})
        host["ranks"].append(rank["rank"])
        host["devices"].append(rank["device"])
        host["cpus"].append(rank["cpus"])
    return list(hosts.values())


def _is_noted(name: str) -> bool:
    known = any(name.startswith(prefix) if prefix.endswith("_") else name == prefix for prefix in TAKEN)
    return known and not is_secret_name(name)
