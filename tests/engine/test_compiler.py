"""Compilation and activation checkpointing of a run: refused where nothing compiles, and no trace in what is saved."""

import functools
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.cli import main
from pretrain.commandline import find_recipe
from pretrain.engine.distributed import Processes
from pretrain.engine.optimizer import OptimizerConfig, build_optimizer
from pretrain.engine.tracking import read_metrics
from tests.model.test_efficiency import inputs_of, model_of
from tests.runs import tiny_pretraining


@pytest.fixture(scope="module")
def recipe(packed_shards, tmp_path_factory) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)


def test_compiling_without_a_compiler_is_refused_before_anything_starts(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    command = ["pretrain", "--config", str(recipe), "--out", str(tmp_path / "run"), "--steps", "4", "--compile", "true"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("tubelet: compile: needs the compiler g")
    assert "install it, or leave compile out" in said
    assert not (tmp_path / "run").exists()


def test_compiling_under_zero_3_is_refused_before_anything_starts(recipe, tmp_path, capsys):
    command = ["pretrain", "--config", str(recipe), "--out", str(tmp_path / "run"), "--steps", "4", "--compile", "true"]
    assert main([*command, "--deepspeed", "zero3"]) == 2
    assert "compile: does not go with ZeRO 3 of deepspeed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("deepspeed", [None, "zero1"])
def test_a_compiled_model_trains_and_is_exported_under_its_own_names(deepspeed, tmp_path):
    torch._dynamo.reset()
    model = model_of("joint")
    names, before = list(model.state_dict()), model.encoder.norm.bias.detach().clone()
    inputs = inputs_of(model)
    model.compile(backend="aot_eager")
    folder = find_recipe(deepspeed, "deepspeed", ".json") if deepspeed else None
    with Processes("bf16", micro_batch=2, deepspeed=folder) as processes:
        prepared, optimizer = processes.prepare(model, build_optimizer(model, OptimizerConfig(), 256))
        for _ in range(2):
            processes.accelerator.backward(prepared(*inputs).loss.mean())
            optimizer.step()
            optimizer.zero_grad()
        weights = processes.accelerator.get_state_dict(prepared)
    torch._dynamo.reset()
    assert list(weights) == names
    assert not torch.equal(weights["encoder.norm.bias"].float(), before)


@pytest.mark.parametrize("deepspeed", [None, "zero3"])
def test_a_run_that_recomputes_activations_trains_as_one_that_keeps_them_and_is_resumed_as_such(
    recipe, tmp_path, deepspeed
):
    command = ["pretrain", "--config", str(recipe), *(["--deepspeed", deepspeed] if deepspeed else [])]
    command += ["--steps", "6", "--checkpoint.every", "4"]
    for name, flag in (("kept", "false"), ("recomputed", "true")):
        assert main([*command, "--out", str(tmp_path / name), "--activation_checkpointing", flag]) == 0
    killed = shutil.ignore_patterns("step-00000006", "summary.json")  # as if the kill had come after step 4
    for name, flag in (("resumed", "true"), ("both", "false")):
        shutil.copytree(tmp_path / "recomputed", tmp_path / name, ignore=killed)
        assert main([*command, "--out", str(tmp_path / name), "--activation_checkpointing", flag]) == 0
    names = ("kept", "recomputed", "resumed", "both")
    losses = {name: [entry["loss"] for entry in read_metrics(tmp_path / name / "metrics.jsonl")] for name in names}
    read = functools.cache(lambda name: load_file(tmp_path / name / "encoder" / "model.safetensors"))
    for name in names[1:]:
        assert losses[name] == losses["kept"]
        assert list(read(name)) == list(read("kept"))
        assert all(torch.equal(value, read("kept")[key]) for key, value in read(name).items())
