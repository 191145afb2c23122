"""`tubelet estimate` against real runs, real models and published figures; what cannot be is refused in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from launch.cli import main
from launch.estimate import Question, length_of, read_run, trained_model
from launch.estimate_tables import count_text, hours_text, show, size_text
from pretrain.engine.activations import fake_activations
from tests.runs import TINY, tiny_pretraining

WIDER = ["--encoder.width", "96", "--decoder.width", "64"]  # so that names and shapes matter less in its files


@pytest.fixture(scope="module")
def recipe(packed_shards, tmp_path_factory) -> str:
    return str(tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> Path:
    """A pretraining run of 7 steps with 4 checkpoints, of which 2 stay."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert (
        main(["pretrain", "--config", recipe, "--out", str(out), "--steps", "7", "--checkpoint.every", "2", *WIDER])
        == 0
    )
    return out


def told(capsys, *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["estimate", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_has_the_parameters_steps_and_checkpoints_that_were_estimated(run, capsys):
    estimate = told(capsys, "--config", run / "config.yaml", "--from", run)
    summary = json.loads((run / "summary.json").read_text())
    newest = load_file(run / "checkpoints/step-00000007/model.safetensors")
    encoder = load_file(run / "encoder/model.safetensors")
    assert estimate["parameters"]["total"] == sum(value.numel() for value in newest.values())
    assert estimate["parameters"]["encoder"] == sum(value.numel() for value in encoder.values())
    assert estimate["batch"]["accumulation"] == 2
    assert estimate["length"]["steps"] == summary["steps"] == 7
    assert estimate["length"]["clips"] == 28
    kept = sorted((run / "checkpoints").iterdir())
    assert (estimate["checkpoints"]["written"], estimate["checkpoints"]["kept"]) == (4, len(kept))
    for folder in kept:
        size = sum(path.stat().st_size for path in folder.glob("*.*") if path.name != "manifest.json")
        assert estimate["checkpoints"]["bytes"] == pytest.approx(size, rel=0.05)
    seconds = 28 / summary["clips_per_second"]
    assert estimate["time"]["gpu_hours"] == pytest.approx(seconds / 3600)
    assert f"{run}, " in estimate["time"]["source"]
    assert "settings" not in estimate["time"]["source"]


def test_more_gpus_divide_the_time_and_not_the_gpu_hours(run, capsys):
    options = ["--config", run / "config.yaml", "--from", run, "--data.global_batch", 8]
    alone, four = told(capsys, *options), told(capsys, *options, "--nodes", 2, "--gpus", 2, "--precision", "bf16")
    assert (four["nodes"], four["gpus"], four["world"]) == (2, 2, 4)
    assert four["batch"]["accumulation"] == 1
    assert four["time"]["gpu_hours"] == pytest.approx(alone["time"]["gpu_hours"])
    assert four["time"]["hours"] == pytest.approx(alone["time"]["hours"] / 4)
    assert "other settings (precision fp32 there, bf16 here)" in four["time"]["source"]


def test_the_configured_engine_and_checkpointing_decide_the_total(recipe, capsys):
    options = ["--config", recipe, "--steps", 9, "--deepspeed", "zero2", "--precision", "bf16"]
    whole, recomputed = told(capsys, *options), told(capsys, *options, "--activation_checkpointing", "true")
    assert whole["time"] is None
    for estimate, name in ((whole, "kept"), (recomputed, "recomputed")):
        assert [row["engine"] for row in estimate["memory"] if row["configured"]] == ["ZeRO 2"]
        row = estimate["memory"][3]
        assert row["activations"] == estimate["activations"]["DeepSpeed"][name]
        parts = ("weights", "gradients", "optimizer", "buffers", "batches", "activations")
        assert row["total"] == sum(row[part] for part in parts)
        assert row["checkpoint"] == estimate["checkpoints"]["bytes"]
    assert whole["activations"] == recomputed["activations"]


def test_steps_are_measured_here_when_asked_for(recipe, capsys):
    measured = told(capsys, "--config", recipe, "--steps", 9, "--measure")["time"]
    assert measured["clips_per_second_per_gpu"] > 0
    assert measured["gpu_hours"] == pytest.approx(36 / measured["clips_per_second_per_gpu"] / 3600)
    assert "5 steps of 2 clips here on " in measured["source"]


def test_a_finetuning_run_is_estimated_with_as_many_classes_as_its_set_has(packed_shards, tmp_path, capsys):
    recipe = tmp_path / "finetune.yaml"
    model = "architecture: {width: 32, depth: 1, heads: 2, tubelet: [2, 8, 8]}\nhead: {pool: mean}\nsteps: 6\n"
    recipe.write_text(TINY + model + "mixing: {mixup: 0.8}\n")
    by_number = told(capsys, "--config", recipe, "--classes", 2, "--samples", 11)
    by_shards = told(capsys, "--config", recipe, "--data.shards", packed_shards)
    assert by_shards["stage"] == "finetune"
    assert by_shards["parameters"] == by_number["parameters"]
    assert by_shards["parameters"]["head"] == 2 * 32 + 32 * 2 + 2
    assert by_shards["length"] == by_number["length"]
    assert by_shards["length"]["steps_per_epoch"] == 2


def test_frozen_weights_have_no_gradients_and_an_average_takes_four_bytes_a_number(run, tmp_path, capsys):
    recipe = tmp_path / "finetune.yaml"
    recipe.write_text(TINY + f"head: {{pool: mean}}\nencoder: {run}\nsteps: 6\n")
    usual = ["--config", recipe, "--classes", 2, "--samples", 11]
    whole, frozen, averaged = (
        told(capsys, *usual, *more) for more in ([], ["--freeze", "encoder"], ["--ema.decay", "0.9"])
    )
    head, total = whole["parameters"]["head"], whole["parameters"]["total"]
    assert frozen["parameters"] == whole["parameters"]
    for before, fewer, more in zip(whole["memory"], frozen["memory"], averaged["memory"], strict=True):
        if before["engine"] == "no DeepSpeed":
            assert (before["gradients"], fewer["gradients"]) == (4 * total, 4 * head)
            assert fewer["weights"] == before["weights"]
            assert before["checkpoint"] - fewer["checkpoint"] == 8 * (total - head)
            assert fewer["activations"] < before["activations"]
        assert more["weights"] - before["weights"] == 4 * total
        assert more["checkpoint"] - before["checkpoint"] == 4 * total


def test_packed_clips_are_estimated_as_full_sequences(recipe):
    positions = ["--encoder.positions", "factorised", "--steps", "9"]
    found = []
    for tokens in (32, 64):
        packing = ["--data.packing.group=2", f"--data.packing.tokens={tokens}"]
        config, _ = read_run(Question(recipe, positions + packing))
        trained = trained_model(config, None)
        model = trained.on_meta()
        packed = fake_activations(model, trained.batch(2), trained.loss, "fp32", False)
        found.append((trained.parameters(model), packed.total))
    assert found[0][0] == found[1][0]
    assert found[1][1] > 1.8 * found[0][1]


# VideoMAE (arXiv 2203.12602) counts the head of 400 classes too.
@pytest.mark.parametrize(("name", "millions"), [("videomae_s", 22), ("videomae_b", 87), ("videomae_l", 305)])
def test_recipes_have_the_published_sizes_and_lengths(name, millions):
    config, stage = read_run(Question(name, []))
    trained = trained_model(config, None)
    assert stage == "pretrain"
    assert trained.parameters(trained.on_meta())["encoder"] == pytest.approx(millions * 1e6, rel=0.01)
    length = length_of(config, 240_000)
    assert (length["epochs"], length["steps"]) == (1600, 1600 * (240_000 // config.data.global_batch))
    assert length_of(config, None)["steps"] is None


def test_people_get_tables_that_say_what_is_unknown_and_how_to_know_it(recipe, run, capsys):
    assert main(["estimate", "--config", recipe, "--data.shards", "null", "--epochs", "3"]) == 0
    said = capsys.readouterr().out
    assert "unknown: give --data.shards SHARDS, or --samples N" in said
    assert "not measured: give --throughput CLIPS_PER_SECOND, --from RUN or --measure" in said
    assert main(["estimate", "--config", recipe, "--steps", "7", "--from", str(run), *WIDER]) == 0
    said = capsys.readouterr().out
    assert "GPU-hours" in said
    assert "no DeepSpeed <-" in said
    assert "unknown" not in said


def test_the_peak_of_a_measurement_is_shown_although_the_length_of_the_run_is_unknown(recipe, capsys):
    estimate = told(capsys, "--config", recipe, "--data.shards", "null", "--epochs", "3", "--throughput", "9")
    estimate["time"]["peak_gib"] = 1.5
    with Console(width=200) as console, console.capture() as captured:
        show(estimate, console)
    assert re.search(r"peak memory\W+1\.50 GiB", captured.get())


def test_figures_are_written_as_people_say_them():
    assert [size_text(size) for size in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.50 KiB", "5.00 GiB"]
    assert [count_text(count) for count in (0, 999_999, 94_211_328, 7.76e19)] == ["0", "999,999", "94.2 M", "77.6 E"]
    assert [hours_text(hours) for hours in (0.5, 1, 1065)] == ["30.0 min", "1.0 h", "1,065.0 h"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "videomae_x"], "videomae_x: is no file and no recipe of configs/pretrain or configs/finet"),
        (["--config", "k400_x"], "k400_x: is no file and no recipe of configs/pretrain or configs/finetune; did you m"),
        (["--config", "demo"], "demo: is a recipe of configs/pretrain and of configs/finetune; give --stage with one"),
        (["--stage", "finetune", "--config", "videomae_b"], "videomae_b: is no file and no recipe of configs/finetune"),
        (["--nodes", "-2"], "--nodes: -2 must be at least 1"),
        (["--gpus", "0"], "--gpus: 0 must be at least 1"),
        (["--gpus", "some"], "estimate: argument --gpus: invalid int value: 'some'"),
        (["--gpus", "3"], "data.global_batch: 4 samples do not divide among 3 processes; use 6"),
        (["--gpus", "4"], "data.micro_batch: 4 processes x 2 samples do not divide data.global_batch 4; use 1"),
        (["--from", "/nowhere"], "--from: /nowhere/summary.json is missing or unreadable; give the folder of a"),
        (["--throughput", "0"], "--throughput: 0.0 clips per second and GPU must be greater than 0"),
        (["--throughput", "9", "--measure"], "--throughput, --from, --measure: give one of them"),
        (["--measure", "--precision", "fp16"], "precision: fp16 needs a GPU; use bf16 or fp32"),
        (["--samples", "9"], "--samples: the shards tell how many there are"),
        (["--data.shards", "null", "--samples", "3"], "data.global_batch: 4 is more than the 3 samples"),
        (["--data.shards", "/nowhere"], "data.shards: /nowhere: no such folder"),
        (["--steps", "2"], "optimizer.warmup_epochs: the warm-up takes 3 steps of a run of 2"),
        (["--steps", "null"], "steps, epochs: give exactly one of them"),
        (["--deepspeed", "zero4"], "zero4: is no file and no recipe of configs/deepspeed; did you mean zero"),
        (["--encoder.widht", "9"], "encoder.widht: there is no such field; did you mean encoder.width?"),
        (["--mask.ratio", "1"], "mask.ratio: 1.0 must lie between 0 and 1"),
        (["--config", "k400_b"], "encoder: is missing; give a pretraining run, or an architecture"),
        (
            ["--stage", "pretrain", "--config", "demo", "--classes", "5"],
            "--classes: is for finetuning without data.shards",
        ),
        (["--config", "demo_scratch"], "--classes: is missing; give the number of classes, or data.shards"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_estimated_is_refused_in_one_line(recipe, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    given = options if "--config" in options else ["--config", recipe, "--steps", "8", *options]
    assert main(["estimate", *given]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith(f"tubelet: {message}")
    assert not list(tmp_path.iterdir())


def test_the_throughput_of_another_model_is_refused(recipe, run, capsys):
    capsys.readouterr()
    options = ["--encoder.depth", "2", "--mask.ratio", "0.25", "--data.clip.frames", "8"]
    assert main(["estimate", "--config", recipe, "--steps", "8", "--from", str(run), *WIDER, *options]) == 2
    said = capsys.readouterr().err
    assert f"--from: {run} trained another model than this (encoder.depth, mask, data.clip.frames differ)" in said
