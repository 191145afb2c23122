"""Frozen layers: they stay as they are, cost no gradients, no state and no backward pass, and skip no branch."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.classifier import Classifier
from finetune.config import HeadConfig
from finetune.freezing import freeze
from launch.cli import main
from pretrain.engine.optimizer import OptimizerConfig, build_optimizer
from pretrain.errors import Refused
from pretrain.model.blocks import Block
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import build_encoder

DEPTH = 3


def classifier(pool: str, name: str = "joint") -> Classifier:
    sizes = {"depth": DEPTH - 1, "temporal_depth": 1} if name == "factorised_encoder" else {"depth": DEPTH}
    config = EncoderConfig(name=name, width=32, heads=2, tubelet=(2, 8, 8), drop_path=0.5, **sizes)
    return Classifier(build_encoder(config, 4, 16, class_token=pool == "class_token"), HeadConfig(pool=pool), 3)


def trained(model: Classifier) -> set[str]:
    return {name.removeprefix("encoder.") for name, parameter in model.named_parameters() if parameter.requires_grad}


def clips() -> torch.Tensor:
    return torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["joint", "factorised_encoder", "factorised_self_attention"])
@pytest.mark.parametrize("frozen", [1, 2, DEPTH + 1])
def test_the_lowest_layers_are_frozen_and_no_other(name, frozen):
    model = classifier("mean", name)
    freeze(model, frozen)
    for parameter_name, parameter in model.encoder.named_parameters():
        assert parameter.requires_grad == (model.encoder.layer_of(parameter_name) >= frozen)
    assert any(name.startswith("head.") for name in trained(model))


@pytest.mark.parametrize(
    ("pool", "left"), [("mean", {"head"}), ("attention", {"head", "pool"}), ("class_token", {"head", "class_token"})]
)
def test_a_frozen_encoder_leaves_what_is_fresh_to_train(pool, left):
    model = classifier(pool)
    freeze(model, "encoder")
    assert {name.split(".")[0] for name in trained(model)} == left


def test_a_class_token_that_was_pretrained_is_frozen_with_the_encoder():
    model = classifier("class_token")
    model.encoder.has_class_tokens = True
    freeze(model, "encoder")
    assert {name.split(".")[0] for name in trained(model)} == {"head"}


def test_frozen_blocks_skip_no_branch_and_the_others_still_do():
    model = classifier("mean")
    freeze(model, 3)
    model.train()
    assert [block.training for block in model.encoder.blocks] == [False, False, True]
    assert not any(module.training for block in model.encoder.blocks[:2] for module in block.modules())
    assert model.head.training
    model.eval()
    assert not any(module.training for module in model.modules())
    freeze(model, "encoder")
    model.train()
    assert torch.equal(model(clips()), model(clips()))


def test_the_backward_pass_ends_above_the_frozen_layers():
    model = classifier("mean")
    freeze(model, 3)
    needs: list[bool] = []
    for block in model.encoder.blocks:
        assert isinstance(block, Block)
        block.register_forward_hook(lambda *given: needs.append(given[-1].requires_grad))
    model.train()
    model(clips()).square().sum().backward()
    assert needs == [False, False, True]
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_a_fresh_class_token_learns_through_frozen_layers():
    model = classifier("class_token")
    freeze(model, "encoder")
    model.train()
    model(clips()).square().sum().backward()
    assert model.encoder.class_token.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.encoder.blocks.parameters())


@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_the_optimiser_has_what_is_trained_and_nothing_else_at_the_rates_of_the_whole_model(layer_decay):
    whole, model = classifier("mean"), classifier("mean")
    freeze(model, 2)
    rates = []
    for one in (whole, model):
        names = {parameter: name for name, parameter in one.named_parameters()}
        groups = build_optimizer(one, OptimizerConfig(layer_decay=layer_decay), 256).param_groups
        rates.append({names[parameter]: group.get("lr_scale") for group in groups for parameter in group["params"]})
    assert rates[1] == {name: rates[0][name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_more_layers_than_there_are_are_refused():
    with pytest.raises(Refused, match="freeze: 5 layers, but the encoder has 4, the embedding included"):
        freeze(classifier("mean"), DEPTH + 2)


def test_a_run_leaves_a_frozen_encoder_as_pretrained_and_resumes_exactly(finetuning, pretrained, tmp_path, capsys):
    command = [*finetuning, "--head.pool", "mean", "--freeze", "encoder", "--ema.decay", "0.5"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert "the encoder stays as pretrained: 130 of " in capsys.readouterr().err  # a norm and 32 x 2 + 2
    before = load_file(pretrained / "encoder" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    pairs = [(value, after[f"encoder.{name}"]) for name, value in before.items() if not name.startswith("norm.")]
    assert all(torch.equal(*pair) for pair in pairs)
    out = Path(shutil.copytree(tmp_path / "run", tmp_path / "again"))
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    for name in ("summary.json", "model/model.safetensors"):
        (out / name).unlink()
    assert main([*command, "--out", str(out)]) == 0
    again = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in after.items())
    assert main([*command, "--out", str(out), "--freeze", "1", "--steps", "8"]) == 2
    assert "freeze: is 1, but " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--freeze", "0"], "freeze: 0 must be at least 1, or encoder"),
        (["--freeze", "3"], "freeze: 3 layers, but the encoder has 2, the embedding included"),
        (["--freeze", "all"], "freeze: expected int or one of 'encoder', got all"),
        (["--freeze", "1", "--encoder", "null"], "freeze: is for a pretrained encoder"),
    ],
)
def test_what_cannot_be_frozen_is_refused(refused, options, message):
    assert message in refused(options)
