"""`tubelet launch` into the folder of another run: one line, exit code 2, and nothing is started or written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.engine import manifest
from pretrain.engine.checkpoint_search import step_folders
from tests.launch.test_cli import refusal
from tests.runs import tiny_pretraining


@pytest.fixture(scope="module")
def recipe(packed_shards, tmp_path_factory) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(["pretrain", "--config", str(recipe), "--out", str(out), "--steps", "4"]) == 0
    return out


@pytest.fixture
def refused(recipe, finished, tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Launches a longer run into a copy of the finished one; returns what is said, which nothing may follow."""
    monkeypatch.setenv("PATH", "/nowhere")  # there is no sbatch
    out = Path(shutil.copytree(finished, tmp_path / "run"))

    def launch(*options: object, place: tuple[str, ...] = ("slurm", "--gpus", "0", "--nodes", "2")) -> str:
        before = content(out)
        pretrain = ["pretrain", "--config", recipe, "--out", out, "--steps", 8]
        said = refusal(capsys, "launch", *place, "--", *pretrain, *options)
        assert content(out) == before
        return said

    return launch


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", 7], "seed: is 7, but {newest} was written with 0; use that again or give another --out"),
        (["--encoder.heads", 4], "encoder.heads: is 4, but {newest} was written with 2; use that again or give"),
        (["--decoder.depth", 2], "decoder.depth: is 2, but {newest} was written with 1; use that again or give"),
        (["--mask.ratio", 0.75], "use that again, give another --out, or insist with --override_config true"),
        (["--data.global_batch", 8], "data.global_batch: is 8, but {newest} was written with 4; use that again, give"),
        (
            ["--data.lanes", 4, "--seed", 1],
            "data.lanes: is 4, but {newest} was written with 2; use those again or give",
        ),
        (["--seed", 7, "--override-config", "true"], "give another --out; --override_config cannot change seed"),
        (
            ["--resume", "never"],
            "{run}/checkpoints: holds checkpoints, and --resume never would bury them; give another",
        ),
        (["--resume", "/nowhere"], "/nowhere: has no manifest.json, so it is no complete checkpoint"),
        (["--precision", "fp16"], "precision: fp16 needs a GPU; use bf16 or fp32"),
        (["--deepspeed", "zero3", "--compile", "true"], "compile: does not go with ZeRO 3 of deepspeed "),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_run_of_another_configuration_is_not_launched_into_its_folder(refused, tmp_path, options, words):
    run = tmp_path / "run"
    said = refused(*options)
    assert words.format(run=run, newest=run / "checkpoints" / "step-00000004") in said


def test_a_run_on_other_data_is_not_launched_into_its_folder(refused, packed_shards, tmp_path):
    other = Path(shutil.copytree(packed_shards, tmp_path / "other"))
    (other / "index.json").write_text((other / "index.json").read_text() + "\n")
    said = refused("--data.shards", other)
    assert said.startswith(f"tubelet: data.shards: is {other} (fingerprint ")
    assert said.endswith("; use that again or give another --out\n")


def test_a_checkpoint_of_a_newer_tubelet_is_not_launched_from(refused, tmp_path, monkeypatch):
    (folder,) = step_folders(tmp_path / "run" / "checkpoints")
    written = json.loads((folder / "manifest.json").read_text())
    with monkeypatch.context() as newer:
        newer.setattr(manifest, "FORMAT_VERSION", 2)
        manifest.write_manifest(folder, written["step"], written["state"], written["files"])
    assert (
        "manifest.json: has format 2, this Tubelet reads 1; use the Tubelet that wrote it, or give another" in refused()
    )


def test_a_finetuning_is_not_launched_into_the_folder_of_a_pretraining(recipe, finished, tmp_path, capsys):
    finetune = tmp_path / "finetune.yaml"
    finetune.write_text(
        "\n".join(
            line for line in recipe.read_text().splitlines() if not line.startswith(("decoder", "mask", "encoder"))
        )
    )
    options = ["--config", finetune, "--out", finished, "--encoder", finished, "--steps", 8]
    said = refusal(capsys, "launch", "local", "--processes", 2, "--", "finetune", *options)
    assert "step-00000004: was written by pretrain, not by finetune; give another --out" in said


def test_the_doctor_finds_another_run_in_the_folder_and_goes_on_in_its_own(recipe, finished, capsys):
    for options, status, words in (
        ([], "ok", "step-00000004 is the newest, of this very run"),
        (["--seed", 1], "failed", "seed: is 1, but"),
    ):
        command = ["doctor", "--config", recipe, "--out", finished, "--steps", 8, *options]
        assert main(list(map(str, command))) == (2 if status == "failed" else 0)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if " checkpoints " in line]
        assert line.startswith(status)
        assert words in line


def test_the_same_run_is_launched_again_and_with_more_steps(recipe, finished, capsys):
    for steps in (4, 8):
        pretrain = ["pretrain", "--config", str(recipe), "--out", str(finished), "--steps", str(steps)]
        assert main(["launch", "slurm", "--gpus", "0", "--dry-run", "--", *pretrain]) == 0
        assert f"--steps {steps}\n" in capsys.readouterr().out
