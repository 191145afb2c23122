"""`tubelet launch`: a wrong one is one line and exit code 2 before a process starts; a right one is what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from launch.slurm import scripts_folder
from launch.torchrun import run
from pretrain.errors import EXIT_FAILED
from tests.launch.test_cli import refusal
from tests.runs import own_environment, tiny_pretraining


@pytest.fixture(scope="module")
def recipe(packed_shards, tmp_path_factory) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)


@pytest.fixture
def no_slurm(monkeypatch):
    """Whatever this machine has, `sbatch` is not found."""
    monkeypatch.setenv("PATH", "/nowhere")


PRETRAIN = ["pretrain", "--config", "RECIPE", "--steps", "8"]
FINETUNE = ["finetune", "--config", "demo", "--data.shards", "/made/later", "--data.micro_batch", "4"]
ON_CPU = ["slurm", "--gpus", "0", "--nodes", "2", "--"]
WRONG = [
    ([], "launch: nothing: is no place to launch in; give local or slurm"),
    (["cloud", "--", *PRETRAIN], "launch: cloud: is no place to launch in; give local or slurm"),
    (["slurm", "--nodes", "2"], "launch: what to launch is missing; give it after --"),
    (["slurm", "--"], "launch: nothing cannot be launched; after -- or --then give pretrain, finetune, pack, doctor"),
    (
        ["slurm", "--", "demo"],
        "launch: demo cannot be launched; after -- or --then give pretrain, finetune, pack, doctor",
    ),
    (["slurm", "--node", "2", "--", *PRETRAIN], "unrecognized arguments: --node 2; see tubelet launch slurm --help"),
    (["slurm", "--nodes", "two", "--", *PRETRAIN], "argument --nodes: invalid int value: 'two'"),
    (["slurm", "--nodes", "0", "--", *PRETRAIN], "nodes: 0 must be at least 1"),
    (["slurm", "--gpus", "-1", "--", *PRETRAIN], "gpus: -1 must be at least 0"),
    (["slurm", "--gpus", "8", "--tasks", "4", "--", *PRETRAIN], "tasks: each GPU has one task; give --gpus 0"),
    (["slurm", "--array", "0-3", "--", *PRETRAIN], "array: pretrain is one job, not many"),
    (["slurm", "--array", "1-4", "--", "pack", "VIDEOS", "OUT"], "array: 1-4 does not do; give 0-15 for 16 parts"),
    (["slurm", "--nodes", "2", "--", "pack", "VIDEOS", "OUT"], "nodes, gpus, tasks: pack needs none; give --array"),
    (["slurm", "--", "pack", "VIDEOS", "OUT", "--part", "0/2"], "part: the tasks of the array pack one part each"),
    (["slurm", "--", "pack", "VIDEOS", "OUT", "--gop", "0"], "gop: 0 does not do; use 1 or more"),
    (["slurm", "--container", "no.sif", "--", *PRETRAIN], "container: no.sif: no such file; build it with apptainer"),
    (
        [*ON_CPU, *PRETRAIN, "--encoder.widht", "3"],
        "encoder.widht: there is no such field; did you mean encoder.width?",
    ),
    ([*ON_CPU, *PRETRAIN, "--data.micro_batch", "4"], "data.micro_batch: 2 processes x 4 samples do not divide"),
    (["slurm", "--", *PRETRAIN], "data.global_batch: 4 samples do not divide among 8 processes; use 16"),
    ([*ON_CPU, *PRETRAIN, "--data.shards", "/nowhere"], "data.shards: /nowhere: no such folder"),
    ([*ON_CPU, *PRETRAIN, "--steps", "2"], "optimizer.warmup_epochs: the warm-up takes 3 steps of a run of 2"),
    ([*ON_CPU, *PRETRAIN, "--deepspeed", "zero9"], "zero9: is no file and no recipe of configs/deepspeed"),
    ([*ON_CPU, *PRETRAIN, "--init", "/nowhere"], "/nowhere: holds no encoder"),
    ([*ON_CPU, *PRETRAIN, "--help"], "launch: tubelet pretrain --help or --print_config starts nothing"),
    ([*ON_CPU, "finetune", "--config", "ucf101", "--then", *PRETRAIN], "launch: --then joins pretrain and finetune"),
    (
        [*ON_CPU, *PRETRAIN, "--out", "runs/a", "--then", *FINETUNE, "--out", "runs/a"],
        "out: finetune and pretrain both write to runs/a; give each its own --out",
    ),
    ([*ON_CPU, *PRETRAIN], "sbatch: there is no such program here; run this on a login node of the cluster"),
    (["local", "--gpus", "1", "--processes", "2", "--", *PRETRAIN], "gpus, processes: give one of them"),
    (["local", "--processes", "0", "--", *PRETRAIN], "processes: 0 must be at least 1"),
    (["local", "--gpus", "999", "--", *PRETRAIN], "gpus: "),
    (["local", "--processes", "3", "--", *PRETRAIN], "data.global_batch: 4 samples do not divide among 3 processes"),
    (
        ["local", "--processes", "2", "--", "pack", "VIDEOS", "OUT"],
        "launch: pack uses all cores of a machine by itself",
    ),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[words.split(";")[0] for _, words in WRONG])
def test_a_wrong_launch_is_refused_in_one_line(recipe, no_slurm, monkeypatch, tmp_path, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, "launch", *[str(recipe) if argument == "RECIPE" else argument for argument in arguments])
    assert said.startswith("tubelet: ")
    assert words in said
    assert not list(tmp_path.iterdir())


def dry_run(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["launch", "slurm", "--dry-run", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_dry_run_prints_the_script_with_the_options_written_in(recipe, capsys):
    options = ["--nodes", 1, "--gpus", 2, "--time", "1:00:00", "--partition", "gpu", "--account", "mine"]
    text = dry_run(capsys, *options, "--", "pretrain", "--config", recipe, "--steps", 9)
    script = (scripts_folder() / "pretrain.sbatch").read_text()
    assert set(script.splitlines()) - set(text.splitlines()) == {
        line
        for line in script.splitlines()
        if line.startswith(("#SBATCH --gpus", "#SBATCH --ntasks", "#SBATCH --time"))
    }
    directives = re.findall(r"^#SBATCH (\S+)", text, re.M)
    expected = ["nodes=1", "gpus-per-node=2", "ntasks-per-node=2", "time=1:00:00", "partition=gpu", "account=mine"]
    assert {f"--{option}" for option in expected} <= set(directives)
    assert len({directive.split("=")[0] for directive in directives}) == len(directives)
    assert f"export TUBELET_PYTHON={sys.executable}\n" in text
    assert f"\nset -- --config {recipe} --steps 9 --out runs/pretrain\n" in text
    assert text.index("set -- ") < text.index('pretrain "$@"')
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_a_chained_finetuning_waits_for_the_pretraining_and_starts_from_its_encoder(recipe, capsys):
    finetune = ["finetune", "--config", "demo", "--data.shards", "/made/later", "--out", "runs/ft"]
    pretrain = ["pretrain", "--config", recipe, "--steps", 9, "--out", "runs/pt"]
    text = dry_run(capsys, "--gpus", 0, "--", *pretrain, "--then", *finetune)
    first, second = text.split("#!/bin/bash\n")[1:]
    assert "dependency" not in first
    assert "#SBATCH --dependency=afterok:JOB1\n#SBATCH --kill-on-invalid-dep=yes\n" in second
    assert "--out runs/ft --encoder runs/pt\n" in second


def test_packing_is_an_array_and_a_merge_after_it(capsys, tmp_path):
    text = dry_run(capsys, "--array", "0-3", "--cpus", 2, "--", "pack", tmp_path, "shards", "--gop", 8)
    pack, merge = text.split("#!/bin/bash\n")[1:]
    assert "#SBATCH --array=0-3\n" in pack
    assert "#SBATCH --cpus-per-task=2\n" in pack
    assert f"set -- {tmp_path} shards --gop 8\n" in pack
    assert "set -- shards\n" in merge
    assert "#SBATCH --dependency=afterok:JOB1\n" in merge
    assert "--array" not in merge


def test_an_image_is_handed_to_the_script_in_place_of_this_python(recipe, capsys, tmp_path):
    image = tmp_path / "tubelet.sif"
    image.touch()
    text = dry_run(capsys, "--gpus", 0, "--container", image, "--", "pretrain", "--config", recipe, "--steps", 9)
    assert f"export TUBELET_CONTAINER={image}\n" in text
    assert "export TUBELET_PYTHON" not in text


def test_launching_starts_two_processes_and_passes_the_run_s_exit_code_on(recipe, tmp_path, monkeypatch, capfd):
    """torchrun itself ends with 1 whatever its processes end with."""
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, own_environment()[name])
    options = ["--config", recipe, "--out", tmp_path / "run", "--steps", 9, "--stopping.time_limit_s", 1e-9]
    assert main(["launch", "local", "--processes", "2", "--", "pretrain", *map(str, options)]) == 75
    said = capfd.readouterr().err
    assert "tubelet: stopping.time_limit_s is over: ended before its first step; start the same command again" in said
    assert re.search(r"rank\s*: 1 \(local_rank: 1\)", said), said
    assert "tubelet: pretrain: ended with exit code 75, see above; the same command goes on" in said


def test_torchrun_ends_with_the_exit_code_of_the_rank_that_failed(capfd):
    each = ["--standalone", "--nproc-per-node", "2", "--no-python", "bash", "-c"]
    assert run([*each, "exit $((3 * LOCAL_RANK))"]) == 3
    assert run([*each, "kill -9 $$"]) == EXIT_FAILED
    assert run([*each, "true"]) == 0


def test_a_doctor_is_launched_whatever_is_wrong_with_the_run_since_it_tells_it_itself(recipe, capsys):
    text = dry_run(capsys, "--nodes", 2, "--", "doctor", "--config", recipe, "--data.shards", "/nowhere")
    assert f"\nset -- --config {recipe} --data.shards /nowhere --out runs/pretrain\n" in text
    assert text.index("set -- ") < text.index('run_tasks launch doctor "$@"')


def bash(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs bash with the functions of job.sh."""
    command = ["bash", "-c", f'source "$0"; {code}', str(scripts_folder() / "job.sh")]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("--out runs/a --steps 3", "runs/a"),
        ("--out=runs/a --out 'my runs'", "my runs"),
        ("--outer runs/a", ""),
        ("--config --out", ""),
    ],
)
def test_the_batch_script_finds_the_run_s_folder(arguments, value):
    assert bash(f"value_of --out {arguments}").stdout == f"{value}\n"


def test_the_newest_checkpoint_is_the_last_that_is_whole(tmp_path):
    for name in ("step-00000002", "step-00000010", "step-00000012.tmp-3"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    (tmp_path / "checkpoints" / "step-00000011").mkdir()
    assert bash(f"newest_checkpoint {tmp_path}").stdout == "step-00000010\n"
    assert bash("newest_checkpoint /nowhere").stdout == "\n"


@pytest.mark.parametrize(
    ("job", "restarts", "code"), [("7", "1", "75"), ("7", "2", ""), ("8", "1", ""), ("7", "10", ""), ("77", "1", "")]
)
def test_an_outcome_counts_only_for_the_attempt_that_wrote_it(tmp_path, job, restarts, code):
    outcome = '{\n  "exit_code": 75,\n  "reason": "told",\n  "job": "7",\n  "restarts": 1,\n  "pid": 3\n}\n'
    (tmp_path / "outcome.json").write_text(outcome)
    done = bash(f"exit_code_in {tmp_path}/outcome.json || echo -n", SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restarts)
    assert done.stdout == (f"{code}\n" if code else "")
