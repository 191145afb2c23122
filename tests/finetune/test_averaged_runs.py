"""Runs that average their weights: what is averaged, who sees the average, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.classifier import load
from launch.cli import main
from pretrain.data.shards import ShardSet
from pretrain.data.views import views_of
from pretrain.engine.averaging import AVERAGE
from pretrain.engine.tracking import read_metrics

DECAY = 0.7


@pytest.fixture(scope="module")
def command(finetuning) -> list[str]:
    return [*finetuning, "--ema.decay", str(DECAY), "--checkpoint.every", "1", "--checkpoint.keep_last", "9"]


@pytest.fixture(scope="module")
def averaged(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("averaged") / "run"
    assert main([*command, "--out", str(out)]) == 0
    return out


def weights_after(out: Path, step: int, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / name)


def test_the_average_is_that_of_the_weights_after_each_step(averaged):
    expected = weights_after(averaged, 1)
    assert all(torch.equal(value, expected[name]) for name, value in weights_after(averaged, 1, AVERAGE).items())
    for step in range(2, 7):
        now = weights_after(averaged, step)
        expected = {name: DECAY * value + (1 - DECAY) * now[name] for name, value in expected.items()}
        found = weights_after(averaged, step, AVERAGE)
        assert found.keys() == now.keys()
        for name, value in found.items():
            assert torch.allclose(value, expected[name], atol=1e-6)
            assert value.dtype == torch.float32
    assert any(not torch.equal(value, now[name]) for name, value in found.items())


def test_the_exported_model_is_the_average_and_the_record_says_so(averaged):
    exported, average = load_file(averaged / "model" / "model.safetensors"), weights_after(averaged, 6, AVERAGE)
    assert exported.keys() == average.keys()
    assert all(torch.equal(value, average[name]) for name, value in exported.items())
    assert [entry["ema_decay"] for entry in read_metrics(averaged / "metrics.jsonl")] == [0, *[DECAY] * 5]
    assert json.loads((averaged / "evaluation.json").read_text())["weights"] == f"moving average, decay {DECAY}"


def test_training_is_the_same_with_an_average_as_without(averaged, finetuned):
    kept = ("step", "loss", "gradient_norm")
    ours, theirs = (
        [[entry[name] for name in kept] for entry in read_metrics(folder / "metrics.jsonl")]
        for folder in (averaged, finetuned)
    )
    assert ours == theirs, "validation with the average leaves the weights and the draws as they were"
    own = weights_after(averaged, 6)
    assert all(torch.equal(value, own[name]) for name, value in weights_after(finetuned, 6).items())


def test_validation_and_evaluation_are_of_the_average(averaged, packed_shards):
    model, description = load(averaged)
    shards = ShardSet.open(packed_shards)
    samples = [shards.read(number) for number in range(shards.samples)]
    with torch.no_grad():
        found = [int(model(views_of(one, description.clip)).argmax()) == one.label for one in samples]
    share = sum(found) / len(found)
    assert json.loads((averaged / "evaluation.json").read_text())["top1"] == pytest.approx(share)
    assert read_metrics(averaged / "metrics.jsonl")[-1]["validation_top1"] == pytest.approx(share)


def test_an_interrupted_run_ends_with_the_same_weights_and_average(averaged, command, tmp_path):
    out = Path(shutil.copytree(averaged, tmp_path / "run"))
    for step in (4, 5, 6):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    for name in ("summary.json", "evaluation.json", "model/model.safetensors"):
        (out / name).unlink()
    assert main([*command, "--out", str(out), "--checkpoint.background", "true"]) == 0
    files = [*(f"checkpoints/step-00000006/{name}" for name in ("model.safetensors", AVERAGE)), "evaluation.json"]
    for name in (*files, "model/model.safetensors", "checkpoints/step-00000005/average.safetensors"):
        assert (out / name).read_bytes() == (averaged / name).read_bytes(), name


def test_a_run_killed_between_its_last_checkpoint_and_the_export_exports_the_average(averaged, command, tmp_path):
    out = Path(shutil.copytree(averaged, tmp_path / "run"))
    shutil.rmtree(out / "model")
    (out / "summary.json").unlink()
    assert main([*command, "--out", str(out)]) == 0
    for name in ("model/model.safetensors", "evaluation.json"):
        assert (out / name).read_bytes() == (averaged / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ema.decay", "1.0"], "ema.decay: 1.0 must be greater than 0 and less than 1"),
        (["--ema.decay", "null", "--ema.warmup", "true"], "ema.warmup: needs ema.decay"),
        (["--deepspeed", "zero3"], "ema.decay: does not go with ZeRO 3 of deepspeed"),
    ],
)
def test_an_average_that_cannot_be_is_refused(command, tmp_path, capsys, options, message):
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_begin_or_change_its_average_in_the_middle(averaged, finetuned, finetuning, tmp_path, capsys):
    for before, options, message in (
        (averaged, ["--ema.decay", "0.9"], "ema.decay: is 0.9, but"),
        (averaged, [], "ema.decay: is None, but"),
        (finetuned, ["--ema.decay", "0.9"], "ema.decay: is 0.9, but"),
    ):
        out = Path(shutil.copytree(before, tmp_path / f"run{len(list(tmp_path.iterdir()))}"))
        capsys.readouterr()
        assert main([*finetuning, "--out", str(out), "--steps", "8", *options]) == 2
        assert message in capsys.readouterr().err
