"""Runs on packed clips of several sizes, shapes and durations: pretraining, its worlds, finetuning, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
from finetune.classifier import Classifier, load
from launch.cli import main
from pretrain.data.clips import ClipConfig
from pretrain.data.config import DataConfig
from pretrain.data.packed_views import PackedEvaluationViews
from pretrain.data.sequence_plan import PackingConfig
from pretrain.data.shards import ShardSet
from pretrain.engine.tracking import read_metrics
from pretrain.errors import Refused
from pretrain.model.encoder import EncoderConfig
from pretrain.model.masking import MaskConfig
from pretrain.packing import validate_packed, visible_tokens
from tests.runs import run
from tests.videos import make_video

pytestmark = pytest.mark.xdist_group("packed runs")  # one worker, which makes once what these tests share

TINY = """
precision: fp32
log_every: 1
tracking: none
steps: 3
data:
  global_batch: 8
  micro_batch: 4
  lanes: 2
  shards_per_window: 2
  workers: 0
  decode_limit_s: 0
  clip: {frames: 8, stride: 1, size: 32}
  packing: {group: 2, tokens: 32}
optimizer: {base_lr: 6.4e-2, base_min_lr: 6.4e-4, warmup_steps: 1}
"""
PRETRAINING = """
encoder: {width: 24, depth: 1, heads: 2, tubelet: [2, 8, 8], positions: factorised}
decoder: {width: 16, depth: 1, heads: 2}
mask: {name: random, ratio: 0.5}
"""


@pytest.fixture(scope="module")
def recipe(sized_shards, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "packed.yaml"
    path.write_text(TINY.replace("data:", f"data:\n  shards: {sized_shards}") + PRETRAINING)
    return str(path)


@pytest.fixture(scope="module")
def pretrained(recipe, sized_shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    command = ["pretrain", "--config", recipe, "--out", str(out), "--checkpoint.every", "2"]
    assert main([*command, "--validation.shards", str(sized_shards)]) == 0
    return out


@pytest.fixture(scope="module")
def finetuning(pretrained, sized_shards, tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("finetuning") / "packed.yaml"
    path.write_text(TINY.replace("data:", f"data:\n  shards: {sized_shards}") + "head: {pool: mean}\ndrop_path: 0.0\n")
    return ["finetune", "--config", str(path), "--encoder", str(pretrained), "--validation.shards", str(sized_shards)]


@pytest.fixture(scope="module")
def finetuned(finetuning, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finetuned") / "run"
    assert main([*finetuning, "--out", str(out), "--views.temporal", "2"]) == 0
    return out


def test_a_packed_run_leaves_a_loss_its_utilisation_pictures_and_an_encoder_that_says_how_clips_are_sized(pretrained):
    entries = read_metrics(pretrained / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert all(0.4 < entry["utilisation"] <= 1 for entry in entries)
    assert len({entry["utilisation"] for entry in entries}) > 1
    assert entries[-1]["validation_loss"] == pytest.approx(1, abs=0.3)
    assert entries[-1]["validation_errors"] == 0
    assert len(list((pretrained / "pictures").iterdir())) == 4
    description = json.loads((pretrained / "encoder" / "config.json").read_text())
    assert description["packing"] == {"group": 2, "tokens": 32, "aspect": 2.0}
    weights = load_file(pretrained / "encoder" / "model.safetensors")
    # A square of 32 pixels has 4 x 4 tubelets; sides of up to 2 to 1 reach 32 * sqrt(2) / 8 = 5.
    lengths = {name: weights[f"positions.{name}"].shape[1] for name in ("slots", "rows", "columns")}
    assert lengths == {"slots": 4, "rows": 5, "columns": 5}


def test_a_packed_run_resumes_to_the_bit(pretrained, tmp_path):
    command = ["pretrain", "--config", str(pretrained / "config.yaml"), "--out", str(tmp_path / "resumed")]
    assert main([*command, "--resume", str(pretrained / "checkpoints" / "step-00000002")]) == 0
    weights = [folder / "encoder" / "model.safetensors" for folder in (pretrained, tmp_path / "resumed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_two_processes_give_the_loss_and_the_gradient_of_one_that_accumulates(pretrained, recipe, tmp_path):
    """One process takes two micro-batches in a step, two take one each: either count left out would halve one loss."""
    out = tmp_path / "run"
    done = run("pretrain", ["--config", recipe, "--out", out], tmp_path, world=2)
    assert done.codes == [0, 0], done.text
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (out, pretrained))
    for name, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-4), ("utilisation", 1e-9)):
        assert [one[name] for one in ours] == pytest.approx([one[name] for one in theirs], rel=tolerance), name
    weights, expected = (load_file(folder / "encoder" / "model.safetensors") for folder in (out, pretrained))
    for name, value in weights.items():
        assert (value - expected[name]).abs().max() < 1e-3, name


def test_a_packed_classifier_learns_is_evaluated_clip_by_clip_and_predicts(finetuned, sized_shards, tmp_path):
    entries = read_metrics(finetuned / "metrics.jsonl")
    assert all(0.4 < entry["utilisation"] <= 1 for entry in entries)
    figures = json.loads((finetuned / "evaluation.json").read_text())
    assert (figures["samples"], figures["errors"], figures["views"]["temporal"]) == (12, 0, 2)
    command = ["evaluate", "--model", str(finetuned), "--shards", str(sized_shards), "--workers", "0"]
    assert main([*command, "--out", str(tmp_path / "evaluation")]) == 0
    files = [make_video(tmp_path / f"{name}.mp4", frames=name, height=40, width=60) for name in (1, 20)]
    for prediction in finetune.load(finetuned).predict([str(file) for file in files]):
        assert prediction.error is None
        assert sum(probability for _, probability in prediction.classes) == pytest.approx(1)


def test_a_packed_clip_has_the_logits_that_the_plain_classifier_gives_it(finetuned, sized_shards):
    model, description = load(finetuned)
    views = PackedEvaluationViews(ShardSet.open(sized_shards), description.packed)
    for number in range(6):
        grid, (clip,) = views.clips(number)
        plain = Classifier(description.build_encoder(), description.head, 2)
        plain.load_state_dict(model.state_dict())
        positions = plain.encoder.positions
        for name, length in zip(("slots", "rows", "columns"), grid, strict=True):
            setattr(positions, name, torch.nn.Parameter(getattr(positions, name)[:, :length]))
        sequences = views[number, True].sequences
        with torch.no_grad():
            torch.testing.assert_close(model(visible_tokens(sequences))[0], plain(clip[None]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoder.positions", "sincos"], "encoder.positions: sincos is for one token grid, but data.packing gives"),
        (["--data.packing.group", "3"], "data.packing.group: 3 clips in a sequence do not divide data.micro_batch 4"),
        (["--data.packing.tokens", "15"], "data.packing.tokens: 15 places cannot hold one slot of each of data.pack"),
    ],
)
def test_a_pretraining_run_that_cannot_be_packed_is_refused_in_one_line(recipe, tmp_path, capsys, options, message):
    assert main(["pretrain", "--config", recipe, "--out", str(tmp_path / "run"), *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"tubelet: {message}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("clip", "encoder", "mask", "message"),
    [
        ({}, {"name": "factorised_encoder"}, {}, "encoder.name: factorised_encoder cannot take the clips of data.pack"),
        ({}, {}, {"name": "tube"}, "mask.name: tube is for clips of one size, not for those of data.packing"),
        ({"frames": 7}, {}, {}, "data.clip.frames: 7 frames do not divide into tubelets of 2"),
        ({}, {}, {"ratio": 1.0}, "mask.ratio: 1.0 must lie between 0 and 1"),
        ({}, {"tubelet": (2, 0, 8)}, {}, "encoder.tubelet: 2 x 0 x 8 must be at least 1 x 1 x 1"),
        ({"size": 7}, {}, {}, "data.clip.size: 7 pixels are less than a tubelet of 8 x 8"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is_opened(clip, encoder, mask, message):
    data = DataConfig(clip=ClipConfig(**{"frames": 8, "stride": 1, "size": 32} | clip), packing=PackingConfig())
    architecture = EncoderConfig(**{"tubelet": (2, 8, 8), "positions": "rotary"} | encoder)
    with pytest.raises(Refused) as refused:
        validate_packed(data, architecture, "encoder", MaskConfig(**{"name": "random"} | mask))
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head.pool", "class_token"], "head.pool: class_token is for clips one by one, not for those of data.pack"),
        (["--mixing.mixup", "0.8"], "mixing.mixup, mixing.cutmix: mix clips of one size, which those of data.packing"),
        (["--views.spatial", "3"], "views.spatial: 3 crops, but data.packing shows whole frames; use 1"),
        (["--data.packing.aspect", "3"], "data.packing: asks for packed clips up to aspect 3.0, but the encoder in"),
        (["--data.packing", "null"], "data.packing: asks for clips of one size, but the encoder in"),
    ],
)
def test_a_finetuning_run_that_cannot_be_packed_is_refused_in_one_line(finetuning, tmp_path, capsys, options, message):
    assert main([*finetuning, "--out", str(tmp_path / "run"), *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"tubelet: {message}")


@pytest.mark.parametrize("stage", ["pretrained", "finetuned"])
def test_the_clips_of_a_packed_run_are_listed_with_the_frames_that_each_has(stage, sized_shards, capsys, request):
    out = request.getfixturevalue(stage)
    capsys.readouterr()
    assert main(["order", "--config", str(out / "config.yaml"), "--steps", "1:3"]) == 0
    shards = ShardSet.open(sized_shards)
    frames = {shards.key(number): shards.read(number).frames for number in range(shards.samples)}
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    starts = {name: {one["clip_start"] for one in listed if frames[one["key"]] == name} for name in (1, 3, 5, 24)}
    # Of 8 frames at most; a video of 3 frames has clips of 2, one of 5 has clips of 4.
    assert starts[1] == {0}
    assert starts[3] | starts[5] == {0, 1}
    assert max(starts[24]) > 1


@pytest.mark.parametrize("stage", ["pretrained", "finetuned"])
def test_converting_a_model_of_packed_clips_keeps_its_packing(stage, tmp_path, capsys, request):
    run_folder = request.getfixturevalue(stage)
    folder = run_folder / ("encoder" if stage == "pretrained" else "model")
    assert main(["convert", str(run_folder), str(tmp_path / "out")]) == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert ("--data.packing.tokens 32" in capsys.readouterr().err) == (stage == "pretrained")
    assert main(["convert", str(run_folder), str(tmp_path / "other"), "--size", "48"]) == 2
    assert "size: packed clips have no one size" in capsys.readouterr().err


def test_another_packing_is_refused_for_a_run_that_goes_on(pretrained, capsys):
    command = ["pretrain", "--config", str(pretrained / "config.yaml"), "--steps", "4"]
    assert main([*command, "--out", str(pretrained), "--data.packing.tokens", "40"]) == 2
    assert "data.packing: is {'group': 2, 'tokens': 40, 'aspect': 2.0}, but " in capsys.readouterr().err


def test_crops_are_refused_for_a_model_of_packed_clips(finetuned, sized_shards, capsys):
    command = ["evaluate", "--model", str(finetuned), "--shards", str(sized_shards), "--views.spatial", "3"]
    assert main(command) == 2
    assert "views.spatial: 3 crops, but" in capsys.readouterr().err
