"""Low-rank adapters: where they are, that they compute, what is trained with them, and that a run leaves none."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
from finetune.adapters import adapted_layers, add_adapters, merge_adapters, merged
from finetune.classifier import Classifier, PackedClassifier
from finetune.config import HeadConfig, LoraConfig
from finetune.freezing import freeze
from launch.cli import main
from pretrain.data.shards import ShardSet
from pretrain.data.views import views_of
from pretrain.engine.optimizer import OptimizerConfig, build_optimizer
from pretrain.engine.tracking import read_metrics
from pretrain.errors import Refused
from pretrain.model.blocks import recompute_activations
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import ENCODERS, build_encoder
from pretrain.model.packing import PackedTokens

LORA = LoraConfig(rank=4)
EVERYWHERE = LoraConfig(rank=4, targets="all")
RANK_4 = ["--lora.rank", "4"]
NAMES = pytest.mark.parametrize("name", list(ENCODERS))


def classifier(
    name: str = "joint", pool: str = "class_token", kind: type[Classifier] = Classifier, **fields
) -> Classifier:
    torch.manual_seed(0)
    fields = {"width": 32, "depth": 2, "heads": 2, "tubelet": (2, 8, 8), "temporal_depth": 1} | fields
    config = EncoderConfig(name=name, **fields)
    encoder = build_encoder(config, 4, 16, class_token=pool == "class_token")
    return kind(encoder, HeadConfig(pool=pool, init_scale=1.0), 3).eval()


def adapted(config: LoraConfig, name: str = "joint", pool: str = "class_token") -> Classifier:
    model = classifier(name, pool)
    add_adapters(model, config)
    return model


@torch.no_grad()
def learned(model: Classifier) -> Classifier:
    """The model with adapters that are no longer zero."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_(std=0.1)
    return model


def clips() -> torch.Tensor:
    return torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@NAMES
@pytest.mark.parametrize("pool", ["class_token", "mean", "attention"])
@torch.no_grad()
def test_training_starts_from_the_pretrained_model_to_the_bit(name, pool):
    assert torch.equal(adapted(EVERYWHERE, name, pool)(clips()), classifier(name, pool)(clips()))


@NAMES
@pytest.mark.parametrize("targets", ["attention", "mlp", "all"])
@torch.no_grad()
def test_each_adapter_changes_what_is_computed_and_the_merged_weights_compute_the_same(name, targets):
    config = LoraConfig(rank=4, targets=targets)
    model, plain = adapted(config, name), classifier(name)
    before = plain(clips())
    for number, layer in enumerate(adapted_layers(plain.encoder, config)):
        matrix = model.encoder.get_parameter(f"{layer}.lora_B.default.weight")
        matrix.normal_(std=0.1)
        assert not torch.allclose(model(clips()), before, atol=1e-3), layer
        if number:  # one at a time
            matrix.zero_()
    logits = learned(model)(clips())
    plain.load_state_dict(merged(model.state_dict(), config))
    torch.testing.assert_close(plain(clips()), logits, atol=1e-5, rtol=1e-5)
    merge_adapters(model, config)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(clips()), plain(clips()))


@pytest.mark.parametrize("name", ["joint", "cross_frame"])
def test_adapters_compile_with_the_model_and_change_nothing(compiling, name):
    eager, compiled = (learned(adapted(EVERYWHERE, name)).train() for _ in range(2))
    compiled.compile(fullgraph=True, backend="aot_eager")
    for model in (eager, compiled):
        model(clips()).square().sum().backward()
    for (one, expected), (_, parameter) in zip(eager.named_parameters(), compiled.named_parameters(), strict=True):
        assert (expected.grad is None) == (parameter.grad is None) == (not expected.requires_grad), one
        if expected.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-5, rtol=1e-4)


def test_adapters_are_beside_the_linear_layers_of_blocks_that_are_asked_for_and_nowhere_else():
    attention = {"attention.qkv", "attention.projection"}
    mlp = {"mlp.fc1", "mlp.fc2"}
    more = {"message", "message_attention.qkv", "message_attention.projection"}
    for name, targets, layers in (
        ("joint", "attention", attention),
        ("joint", "mlp", mlp),
        ("cross_frame", "all", attention | mlp | more),
        ("cross_frame", "attention", attention | more),
    ):
        model = adapted(LoraConfig(rank=4, targets=targets), name)
        found = {one.rpartition(".lora_A")[0] for one, _ in model.named_parameters() if ".lora_A" in one}
        assert found == {f"encoder.blocks.{block}.{layer}" for block in (0, 1) for layer in layers}
    model = classifier(depth=12)  # peft shortens long lists of names
    add_adapters(model, EVERYWHERE, 5)
    found = {one.rpartition(".lora_A")[0] for one, _ in model.named_parameters() if ".lora_A" in one}
    assert found == {f"encoder.blocks.{block}.{layer}" for block in range(4, 12) for layer in attention | mlp}
    found = {one.split(".")[0] for one in adapted_layers(classifier("factorised_encoder").encoder, LORA)}
    assert found == {"blocks", "temporal_blocks"}


@NAMES
@pytest.mark.parametrize("pool", ["class_token", "mean", "attention"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_adapters_and_what_is_fresh_are_trained_and_nothing_that_was_pretrained(name, pool, recomputes):
    model = learned(adapted(EVERYWHERE, name, pool)).train()
    if recomputes:
        recompute_activations(model)
    fresh = {"class_token"} if pool == "class_token" and name != "cross_frame" else set()
    model(clips()).square().sum().backward()
    for one, parameter in model.named_parameters():
        is_trained = ".lora_" in one or one.startswith(("head.", "pool.")) or one.removeprefix("encoder.") in fresh
        assert parameter.requires_grad == is_trained, one
        assert (parameter.grad is not None) == is_trained, one
        if pool == "mean" and is_trained:  # the last block's other tokens are read by no class token
            assert parameter.grad.abs().sum() > 0, one


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_optimiser_has_adapters_at_the_rates_of_their_layers_and_no_pretrained_weights(layer_decay, rank):
    model = adapted(LoraConfig(rank=rank, targets="all"), "factorised_encoder")
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, OptimizerConfig(layer_decay=layer_decay), 256).param_groups
    found = {names[parameter]: group for group in groups for parameter in group["params"]}
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, group in found.items():
        assert group["weight_decay"] == (0 if name.endswith("bias") or name == "encoder.class_token" else 0.05), name
        layer = 3 if name.startswith("encoder.temporal") else int(name.split(".")[2]) + 1 if ".blocks." in name else 4
        assert group.get("lr_scale", 1.0) == (1.0 if layer_decay is None else 0.5 ** (4 - layer)), name


def test_frozen_layers_have_no_adapters_and_end_the_backward_pass():
    model = classifier(pool="mean")
    add_adapters(model, LORA, 2)
    freeze(model, 2)
    needs: list[bool] = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda *given: needs.append(given[-1].requires_grad))
    model.train()
    assert [block.training for block in model.encoder.blocks] == [False, True]
    model(clips()).square().sum().backward()
    assert needs == [False, True]
    assert {name.split(".")[2] for name, _ in model.named_parameters() if ".lora_" in name} == {"1"}
    with pytest.raises(Refused, match=r"freeze: 3 layers leave no block for the adapters of lora.rank; use at most 2"):
        add_adapters(classifier(), LORA, 3)


def test_a_class_token_that_was_pretrained_stays():
    model = classifier()
    model.encoder.has_class_tokens = True
    add_adapters(model, LORA)
    assert not model.encoder.class_token.requires_grad


@torch.no_grad()
def test_packed_clips_go_through_adapters():
    model = classifier(pool="mean", kind=PackedClassifier, positions="rotary")
    tubelets = torch.randint(0, 256, (1, 6, 2 * 8 * 8 * 3), dtype=torch.uint8)
    packed = PackedTokens(tubelets, torch.zeros(1, 6, 3, dtype=torch.int64), torch.tensor([[0, 0, 0, 1, 1, -1]]))
    before = model(packed, clips=2)
    add_adapters(model, LORA)
    assert torch.equal(model(packed, clips=2), before)
    after = learned(model)(packed, clips=2)
    assert not torch.allclose(after, before, atol=1e-3)
    merge_adapters(model, LORA)
    torch.testing.assert_close(model(packed, clips=2), after, atol=1e-5, rtol=1e-5)


def test_adapters_take_no_memory_where_the_model_takes_none():
    with torch.device("meta"):
        model = adapted(LORA)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert any(".lora_" in name for name, _ in model.named_parameters())


def test_weights_in_half_precision_are_merged_in_full():
    model = learned(adapted(LORA)).bfloat16()
    weights, name = model.state_dict(), "encoder.blocks.0.attention.qkv"
    down, up = (weights[f"{name}.lora_{matrix}.default.weight"].float() for matrix in "AB")
    found = merged(weights, LORA)[f"{name}.weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, weights[f"{name}.base_layer.weight"].float() + 4 * (up @ down))


@pytest.fixture(scope="module")
def with_adapters(finetuning, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "run"
    assert main([*finetuning, *RANK_4, "--lora.dropout", "0.1", "--out", str(out)]) == 0
    return out


def test_a_run_leaves_a_plain_model_and_its_own_evaluation(with_adapters, finetuned, pretrained, packed_shards):
    ours, plain, before = (
        load_file(folder / "model.safetensors")
        for folder in (with_adapters / "model", finetuned / "model", pretrained / "encoder")
    )
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in plain.items()}
    config = "model/config.json"
    assert (with_adapters / config).read_text() == (finetuned / config).read_text()
    changed = {name for name, value in before.items() if not torch.equal(value, ours[f"encoder.{name}"])}
    assert changed == {"blocks.0.attention.qkv.weight", "blocks.0.attention.projection.weight"}
    model, description = finetune.load(with_adapters).model, finetune.load(with_adapters).description
    shards = ShardSet.open(packed_shards)
    told = [json.loads(line) for line in (with_adapters / "predictions.jsonl").read_text().splitlines()]
    with torch.no_grad():
        found = [int(model(views_of(shards.read(number), description.clip)).argmax()) for number in range(len(told))]
    labels = [shards.read(number).label for number in range(len(told))]
    share = sum(one == label for one, label in zip(found, labels, strict=True)) / len(found)
    assert json.loads((with_adapters / "evaluation.json").read_text())["top1"] == pytest.approx(share)


def test_an_evaluation_of_the_model_that_a_run_leaves_is_that_of_the_run(with_adapters, packed_shards, tmp_path):
    again = ["evaluate", "--model", str(with_adapters), "--shards", str(packed_shards), "--out", str(tmp_path)]
    assert main([*again, "--workers", "0"]) == 0
    assert (tmp_path / "predictions.jsonl").read_bytes() == (with_adapters / "predictions.jsonl").read_bytes()


def test_an_interrupted_run_with_adapters_and_an_average_goes_on_to_the_bit(finetuning, tmp_path, capsys):
    command = [*finetuning, *RANK_4, "--lora.dropout", "0.1", "--ema.decay", "0.5", "--optimizer.layer_decay", "0.7"]
    reference = tmp_path / "reference"
    assert main([*command, "--out", str(reference)]) == 0
    assert "with adapters of rank 4 beside 2 of its linear layers: 866 of " in capsys.readouterr().err
    out = Path(shutil.copytree(reference, tmp_path / "run"))
    for name in ("checkpoints/step-00000006", "model"):
        shutil.rmtree(out / name)
    for name in ("summary.json", "evaluation.json"):
        (out / name).unlink()
    assert main([*command, "--out", str(out), "--checkpoint.background", "true"]) == 0
    for name in ("model/model.safetensors", "evaluation.json", "checkpoints/step-00000006/average.safetensors"):
        assert (out / name).read_bytes() == (reference / name).read_bytes(), name
    losses = [[entry["loss"] for entry in read_metrics(folder / "metrics.jsonl")] for folder in (out, reference)]
    assert losses[0] == losses[1]
    for options, message in (
        (["--lora.alpha", "8"], "lora.alpha: is 8.0, but"),
        (["--lora.rank", "null", "--lora.dropout", "0"], "lora.rank: is None, but"),
    ):
        assert main([*command, "--out", str(out), "--steps", "8", *options]) == 2
        assert message in capsys.readouterr().err


def test_a_missing_peft_is_told_with_the_remedy(finetuning, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    capsys.readouterr()
    assert main([*finetuning, *RANK_4, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "lora.rank: peft cannot be imported" in said
    assert "pip install 'tubelet[lora]'" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora.rank", "0"], "lora.rank: 0 must be at least 1; leave it out"),
        (["--lora.rank", "32"], "lora.rank: 32 is not below the encoder's width of 32"),
        (["--lora.alpha", "8"], "lora.rank: is missing; lora.alpha needs it"),
        ([*RANK_4, "--lora.alpha", "0"], "lora.alpha: 0.0 must be greater than 0"),
        ([*RANK_4, "--lora.dropout", "1"], "lora.dropout: 1.0 must be at least 0 and less than 1"),
        ([*RANK_4, "--lora.targets", "qkv"], "lora.targets: "),
        ([*RANK_4, "--freeze", "encoder"], "freeze, lora.rank: no layer is left for adapters"),
        ([*RANK_4, "--freeze", "2"], "freeze: 2 layers leave no block for the adapters of lora.rank; use at most 1"),
        ([*RANK_4, "--encoder", "null"], "lora.rank: is for a pretrained encoder"),
    ],
)
def test_adapters_that_cannot_be_are_refused(refused, options, message):
    assert message in refused(options)
