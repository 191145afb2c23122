"""Jobs of the test cluster, and what the runs in them leave."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import psutil
import pytest

from pretrain.engine.checkpoint_search import step_folders
from tests.cluster.slurm_cluster import SlurmCluster, wait_until

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
JOB_S = 900
ENDED = ("CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
"""All other states are on the way, such as SIGNALING, which a job has for a moment."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of a test.

    Attributes:
        cluster: Where it is.
        number: Its number.
        log: What its batch script and tasks write.
    """

    cluster: SlurmCluster
    number: str
    log: Path

    def shown(self, field: str) -> str:
        """Returns a field of `scontrol show job`, such as `JobState`."""
        told = self.cluster.ask("scontrol", "show", "job", "--oneliner", self.number)
        return re.search(rf"\b{field}=(\S*)", told)[1]

    @property
    def text(self) -> str:
        """Returns the log, of all attempts."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def is_over(self) -> bool:
        """Whether it has ended for good."""
        return self.shown("JobState") in ENDED

    def wait(self, within_s: float = JOB_S) -> str:
        """Waits until the job is over for good; returns its state."""
        try:
            wait_until(lambda: self.is_over, within_s, f"job {self.number} is over")
        except AssertionError as error:
            pytest.fail(f"{error}\n{self.text}")
        return self.shown("JobState")

    def rank(self, number: int) -> psutil.Process:
        """Returns the Python process of a rank."""
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [])[1:3] not in (["-m", "pretrain"], ["-m", "finetune"]):
                continue  # a rank's child, such as the one that decodes, has its variables too
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if (environment.get("SLURM_JOB_ID"), environment.get("SLURM_PROCID")) == (self.number, str(number)):
                    return process
        raise AssertionError(f"job {self.number} has no rank {number}:\n{self.text}")


def newest_step(out: Path) -> int:
    """Returns the step of a run's newest checkpoint; 0 before the first."""
    folders = step_folders(out / "checkpoints")
    return int(folders[-1].name.removeprefix("step-")) if folders else 0


def steps_logged(out: Path) -> list[int]:
    """Returns the steps in a run's metrics, in the order of the file."""
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def jobs_of(cluster: SlurmCluster, folder: Path, said: str) -> list[Job]:
    """Returns the jobs that `tubelet launch slurm` says it has submitted, whose logs are in `folder`."""
    names = re.findall(r"job (\d+): .*/(\w+)\.sbatch", said)
    return [Job(cluster, number, folder / f"tubelet-{name}-{number}.out") for number, name in names]
