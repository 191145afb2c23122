"""What the batch scripts ask `scontrol`, without a SLURM: a function of bash answers in its place."""

import subprocess
from pathlib import Path

import pytest

from tests.runs import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
SHOWN = """JobId=7 JobName=tubelet-pretrain
   Partition=gpu AllocNode:Sid=login:1
   Command=/shared/my code/slurm/{name} --config mine --out /other/runs/x.sbatch/run
   WorkDir=/shared
"""


def bash(program: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    program = f"scontrol() {{ cat; }}\nSLURM_JOB_ID=7\n{program}"
    return subprocess.run(["bash", "-c", program], cwd=ROOT, input=answer, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_a_script_finds_what_lies_beside_it_whatever_its_arguments_are(script: Path):
    (line,) = [line for line in script.read_text().splitlines() if line.startswith("source ")]
    found = bash(line.replace("source", "echo", 1), SHOWN.format(name=script.name))
    assert (found.stdout, found.stderr) == ("/shared/my code/slurm/job.sh\n", "")


def test_a_job_is_not_said_to_be_ended_where_scontrol_does_not_answer():
    ended = bash("source slurm/job.sh; requeue 75")
    assert ended.returncode == 75
    assert (
        ended.stderr == "tubelet: exit code 75; scontrol does not answer, so job 7 is not requeued; submit it again\n"
    )


def test_a_job_that_is_being_ended_is_said_to_be():
    ended = bash("source slurm/job.sh; requeue 1", "JobId=7 JobState=CANCELLED Reason=None")
    assert ended.returncode == 1
    assert ended.stderr == "tubelet: exit code 1; job 7 is being ended, so it is not requeued\n"
