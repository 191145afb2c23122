"""`tubelet launch slurm` on a real SLURM: what it submits, chains, and what it says when SLURM refuses."""

import json
import re
import subprocess
import sys
import zipfile

import pytest
from hatchling.builders.wheel import WheelBuilder

from tests.cluster.jobs import jobs_of
from tests.runs import ROOT
from tests.videos import make_video


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--partition", "nosuch"], "invalid partition specified: nosuch; Batch job submission failed: Invalid part"),
        (["--time", "soon"], "Invalid --time specification"),
        (["--nodes", 3], "Batch job submission failed: Node count specification invalid"),
        (["--cpus", 99], "Batch job submission failed: More processors requested than permitted"),
        (["--gpus", 3], "Batch job submission failed: Requested node configuration is not available"),
        (["--dependency", "afterok:nosuch"], "Batch job submission failed: Job dependency problem"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_refused_submission_is_told_in_slurm_s_words(cluster, launch, recipe, tmp_path, options, words):
    out = tmp_path / "run"
    sizes = ["--data.global_batch", 9, "--data.lanes", 1, "--data.micro_batch", 1]
    pretrain = ["pretrain", "--config", recipe, "--steps", 8, *sizes, "--out", out]
    code, said = launch("--gpus", 0, "--cpus", 1, *options, "--", *pretrain)
    assert code == 2
    assert said.startswith(f"tubelet: sbatch: {words}")
    assert said.endswith("; sinfo tells what the cluster has\n")
    assert said.count("\n") == 1
    assert not out.exists()
    assert not cluster.ask("squeue", "--noheader")


def test_an_array_that_slurm_refuses_leaves_no_merge_behind(cluster, launch, tmp_path):
    make_video(tmp_path / "videos" / "one.mp4", frames=4)
    code, said = launch("--array", "0-99999999", "--", "pack", tmp_path / "videos", tmp_path / "shards")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("tubelet: sbatch: Batch job submission failed: Invalid job array specification")
    assert not (tmp_path / "shards").exists()
    assert not cluster.ask("squeue", "--noheader")


def test_packing_in_an_array_makes_the_set_of_one_process(cluster, launch, tmp_path):
    for number in range(6):
        make_video(tmp_path / "videos" / f"{number}.mp4", frames=10, seed=number)
    options = ["--short-side", 32, "--samples-per-shard", 2]
    code, said = launch("--array", "0-1", "--cpus", 1, "--", "pack", tmp_path / "videos", tmp_path / "shards", *options)
    assert code == 0, said
    _, merge = jobs_of(cluster, tmp_path, said)
    assert merge.wait() == "COMPLETED", merge.text
    alone = [sys.executable, "-m", "launch", "pack", tmp_path / "videos", tmp_path / "alone", *options, "--jobs", 1]
    subprocess.run(list(map(str, alone)), cwd=ROOT, check=True, capture_output=True)
    index, expected = ((tmp_path / name / "index.json").read_bytes() for name in ("shards", "alone"))
    assert index == expected


def test_a_finetuning_follows_the_pretraining_that_it_starts_from(cluster, launch, recipe, tmp_path):
    finetune = tmp_path / "finetune.yaml"
    finetune.write_text(re.sub(r"(encoder|decoder|mask): .*\n", "", recipe.read_text()))
    pretrained, finetuned = tmp_path / "pretrained", tmp_path / "finetuned"
    first = ["pretrain", "--config", recipe, "--steps", 6, "--out", pretrained]
    second = ["finetune", "--config", finetune, "--steps", 6, "--out", finetuned]
    code, said = launch("--gpus", 0, "--cpus", 1, "--", *first, "--then", *second)
    assert code == 0, said
    jobs = jobs_of(cluster, tmp_path, said)
    assert [job.wait() for job in jobs] == ["COMPLETED", "COMPLETED"], jobs[0].text + jobs[1].text
    assert json.loads((finetuned / "outcome.json").read_text())["exit_code"] == 0
    assert f"encoder: {pretrained}" in (finetuned / "config.yaml").read_text()


def test_a_script_that_a_dry_run_printed_can_be_submitted_by_itself(cluster, launch, submit, recipe, tmp_path):
    out = tmp_path / "run"
    code, said = launch(
        "--gpus", 0, "--cpus", 1, "--dry-run", "--", "pretrain", "--config", recipe, "--steps", 6, "--out", out
    )
    assert code == 0, said
    (tmp_path / "printed.sbatch").write_text(said)
    job = submit(tmp_path / "printed.sbatch")
    assert job.wait() == "COMPLETED", job.text
    assert json.loads((out / "outcome.json").read_text())["exit_code"] == 0


def test_the_script_of_a_wheel_works_by_hand_in_any_folder(submit, recipe, tmp_path):
    """Without the checkout: it finds job.sh beside itself, and python what the wheel holds."""
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path / "dist"))
    zipfile.ZipFile(wheel).extractall(tmp_path / "site packages")
    here = tmp_path / "here"
    here.mkdir()
    script = tmp_path / "site packages" / "launch" / "batch" / "pretrain.sbatch"
    options = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", f"--chdir={here}"]
    run = ["--config", recipe, "--steps", 6, "--out", "my run", "--deepspeed", "zero1"]
    job = submit(*options, script, *run, PYTHONPATH=str(tmp_path / "site packages"))
    assert job.wait() == "COMPLETED", job.text
    assert json.loads((here / "my run" / "outcome.json").read_text())["exit_code"] == 0
