"""What the batch scripts make of the ends that tasks can have, with tasks that end in a second."""

import pytest

from tests.cluster.jobs import TWO_NODES, Job
from tests.cluster.slurm_cluster import wait_until
from tests.runs import ROOT

PRETRAIN = (*TWO_NODES, "slurm/pretrain.sbatch", "--config", "demo")


@pytest.fixture
def task(tmp_path):
    """Writes what stands for Python in the tasks; returns its file."""

    def write(body: str) -> str:
        path = tmp_path / "task.sh"
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        return str(path)

    return write


@pytest.mark.parametrize("code", [0, 2, 3])
def test_a_run_that_is_done_refused_or_stopped_by_rule_is_not_requeued(submit, task, tmp_path, code):
    """Although the ranks end at different times, and srun kills the later ones and tells their 137 or 143."""
    python = task(f"sleep $((2 - 2 * SLURM_PROCID)); exit {code}")
    job = submit(*PRETRAIN, "--out", tmp_path / "run", TUBELET_PYTHON=python)
    assert job.wait() == ("FAILED" if code else "COMPLETED"), job.text
    assert job.shown("ExitCode") == f"{code}:0"
    assert job.shown("Restarts") == "0"
    assert not (tmp_path / "run").exists()


def test_a_run_without_its_folder_is_refused(submit):
    job = submit(*PRETRAIN)
    assert job.wait() == "FAILED"
    assert job.shown("ExitCode") == "2:0"
    assert (
        job.text == "pretrain.sbatch: --out: is missing; give the run's folder, where a requeued job finds its "
        "checkpoints\n"
    )


def test_a_run_that_dies_without_a_newer_checkpoint_is_given_up(submit, task, tmp_path):
    job = submit(*PRETRAIN, "--out", tmp_path / "run", TUBELET_PYTHON=task("exit 1"), TUBELET_ATTEMPTS="2")
    assert job.wait() == "FAILED", job.text
    assert (job.shown("Restarts"), job.shown("ExitCode")) == ("1", "1:0")
    assert "2 attempts have ended (the last with exit code 1) without a newer checkpoint than none" in job.text


def test_attempts_that_leave_a_newer_checkpoint_are_not_counted(submit, task, tmp_path):
    out = tmp_path / "run"
    python = task(
        f"folder={out}/checkpoints/step-0000000$SLURM_RESTART_COUNT; mkdir -p $folder; touch $folder/manifest.json\n"
        "[ ${SLURM_RESTART_COUNT:-0} = 3 ] || exit 75"
    )
    job = submit(*PRETRAIN, "--out", out, TUBELET_PYTHON=python, TUBELET_ATTEMPTS="1")
    assert job.wait() == "COMPLETED", job.text
    assert job.shown("Restarts") == "3"


def test_a_job_that_somebody_cancels_stays_cancelled(submit, task, tmp_path):
    """`scontrol requeue` would revive it: the tasks end with 75, as they do on every TERM."""
    python = task("trap 'exit 75' TERM; echo ready; sleep 100 & wait")
    job = submit("--nodes=1", *PRETRAIN[1:], "--out", tmp_path / "run", TUBELET_PYTHON=python)
    wait_until(lambda: "ready" in job.text, 30)
    job.cluster.ask("scancel", job.number)
    assert job.wait() == "CANCELLED"
    job.cluster.ask("sleep", "3")
    assert job.shown("JobState") == "CANCELLED"
    assert "is being ended, so it is not requeued" in job.text


def test_a_preempted_run_requeues_itself_within_the_grace(submit, task, tmp_path):
    """A preempted job whose script ends with 0 counts as completed; requeueing during the grace must work.

    Where it does not, SLURM ends the job after the grace, says so in its log, and requeues it by itself.
    """
    out = tmp_path / "run"
    python = task(
        f"[ -z $SLURM_RESTART_COUNT ] || exit 0\ntrap 'touch {out}/checkpoints/step-1/manifest.json; exit 75' TERM\n"
        f"mkdir -p {out}/checkpoints/step-1; sleep 100 & wait"
    )
    job = submit(*PRETRAIN, "--out", out, TUBELET_PYTHON=python, TUBELET_ATTEMPTS="1")
    wait_until((out / "checkpoints" / "step-1").exists, 30)
    urgent = submit("--partition=high", "--nodes=2", "--exclusive", "--wrap", "sleep 1")
    assert urgent.wait() == "COMPLETED"
    assert job.wait() == "COMPLETED", job.text
    assert job.shown("Restarts") == "1"
    assert f"tubelet: exit code 75; requeueing job {job.number}\n" in job.text
    assert "DUE TO JOB REQUEUE" in job.text, "scontrol requeue does not work any more while a job is preempted"
    assert "DUE TO PREEMPTION" not in job.text


def test_a_run_that_overstays_its_time_limit_is_requeued(submit, task, tmp_path):
    """It has had its warning and needed longer: SLURM would end it for good."""
    out = tmp_path / "run"
    python = task(
        f"[ -z $SLURM_RESTART_COUNT ] || exit 0\nmkdir -p {out}/checkpoints/step-1\n"
        f"trap : USR2; trap 'touch {out}/checkpoints/step-1/manifest.json; exit 75' TERM; while :; do sleep 0.2; done"
    )
    limit = ("--time=1", "--signal=USR2@10")
    job = submit(*limit, *PRETRAIN, "--out", out, TUBELET_PYTHON=python, TUBELET_ATTEMPTS="1")
    assert job.wait() == "COMPLETED", job.text
    assert job.shown("Restarts") == "1"


def test_an_image_runs_in_apptainer_with_the_folder_of_the_job(cluster, submit, tmp_path):
    """With a stand-in for apptainer, which tells how it is called."""
    (tmp_path / "apptainer").write_text('#!/bin/bash\necho "apptainer $@"\n')
    (tmp_path / "apptainer").chmod(0o755)
    out = tmp_path / "run"
    path = f"{tmp_path}:{cluster.environment()['PATH']}"
    job = submit(*PRETRAIN, "--out", out, TUBELET_CONTAINER="/images/tubelet.sif", PATH=path)
    assert job.wait() == "COMPLETED", job.text
    expected = f"apptainer exec --nv --bind {ROOT} /images/tubelet.sif python -m pretrain --config demo --out {out}\n"
    assert job.text == 2 * expected


def test_a_task_of_an_array_that_was_submitted_by_hand_is_requeued_by_itself(submit, task, tmp_path):
    """The last task bears the number of the whole array, which `scontrol requeue` would start again."""
    python = task(
        'echo "task $SLURM_ARRAY_TASK_ID"; [ $SLURM_ARRAY_TASK_ID = 0 ] || [ $SLURM_RESTART_COUNT ] || exit 75'
    )
    array = submit("--array=0-1", "--cpus-per-task=1", "slurm/pack.sbatch", "VIDEOS", "SHARDS", TUBELET_PYTHON=python)
    tasks = [Job(array.cluster, f"{array.number}_{number}", array.log) for number in (0, 1)]
    assert [one.wait() for one in tasks] == ["COMPLETED", "COMPLETED"], array.text
    assert [one.shown("Restarts") for one in tasks] == ["0", "1"]
    assert sorted(line for line in array.text.splitlines() if line.startswith("task")) == ["task 0", "task 1", "task 1"]
