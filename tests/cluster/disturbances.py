"""What ends an attempt of a job on a cluster: each takes a job whose two ranks train.

Where SLURM takes some seconds to act, a short run might come to its end before. There the ranks are stopped first;
SLURM lets them continue with the signal that ends them.
"""

import os
import signal
from collections.abc import Callable

from tests.cluster.jobs import Job
from tests.cluster.slurm_cluster import wait_until

WARNING_S = 120
"""How long before its limit a job shall be warned."""
NOTICED_S = 180
"""Longest time that SLURM takes to notice a lost node or a time limit, and to requeue the job."""


def requeue(job: Job) -> None:
    job.cluster.ask("scontrol", "requeue", job.number)


def signal_tasks(job: Job) -> None:
    job.cluster.ask("scancel", "--signal=USR2", job.number)


def kill_rank_1(job: Job) -> None:
    os.kill(job.rank(1).pid, signal.SIGKILL)


def lose_node_2(job: Job) -> None:
    job.cluster.lose_node("node2")
    try:
        wait_until(lambda: job.shown("Restarts") != "0", NOTICED_S, "the job is requeued")
    finally:
        job.cluster.start_node("node2")


def preempt(job: Job) -> None:
    stop_ranks(job)
    urgent = ("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    job.cluster.ask(*urgent, "--wrap", "sleep 1")


def reach_time_limit(job: Job) -> None:
    """Moves the limit so near that SLURM's warning is due, for which it looks each half a minute.

    That leaves the ranks half a minute at least, on a slow machine too. The next attempt has time again.
    """
    stop_ranks(job)
    hours, minutes, _ = job.shown("RunTime").split(":")
    limit = ("scontrol", "update", f"JobId={job.number}")
    job.cluster.ask(*limit, f"TimeLimit={60 * int(hours) + int(minutes) + WARNING_S // 60}")
    wait_until(lambda: job.shown("Restarts") == "1", NOTICED_S, "the job is requeued before its limit")
    job.cluster.ask(*limit, "TimeLimit=60")


def stop_rank_1(job: Job) -> None:
    os.kill(job.rank(1).pid, signal.SIGSTOP)


def stop_ranks(job: Job) -> None:
    for rank in (0, 1):
        os.kill(job.rank(rank).pid, signal.SIGSTOP)


Disturbance = Callable[[Job], None]
DISTURBANCES: tuple[Disturbance, ...] = (
    requeue,
    signal_tasks,
    kill_rank_1,
    lose_node_2,
    preempt,
    reach_time_limit,
    stop_rank_1,
)
"""Those that a run must survive."""
SAVING: tuple[Disturbance, ...] = (signal_tasks, preempt, reach_time_limit)
"""Those that leave the ranks time to save where they stand and to end with exit code 75."""
