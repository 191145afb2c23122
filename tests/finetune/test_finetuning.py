"""Finetuning runs: they start from an encoder, go on exactly, and refuse what does not fit."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.data import Mixup

from finetune.config import FinetuneConfig, MixingConfig
from finetune.finetuning import finetune
from finetune.objective import build_objective, mix
from launch.cli import main
from pretrain.commandline import parse
from pretrain.data.clips import ClipConfig
from pretrain.data.loader import Batch
from pretrain.engine.draws import seed_draws
from pretrain.engine.tracking import read_metrics


def refusal(capsys, command: list[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    return said[0]


def test_a_run_leaves_curves_a_model_and_the_accuracy_on_held_out_videos(finetuned):
    entries = read_metrics(finetuned / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in entries if "validation_top1" in entry] == [3, 6]
    figures = json.loads((finetuned / "evaluation.json").read_text())
    assert (figures["samples"], figures["errors"]) == (11, 0)
    assert figures["views"] == {"temporal": 1, "spatial": 1}
    assert len(figures["fingerprint"]) == 64
    summary = json.loads((finetuned / "summary.json").read_text())
    assert summary["top1"] == figures["top1"]
    assert json.loads((finetuned / "model" / "config.json").read_text())["classes"] == ["jump", "run"]


def test_a_run_with_pyav_learns_the_same_and_never_asks_for_decord(finetuned, finetuning, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    assert main([*finetuning, "--out", str(tmp_path / "run"), "--data.decoder", "pyav"]) == 0
    for name in ("model/model.safetensors", "evaluation.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finetuned / name).read_bytes()


def test_resuming_with_drop_path_mixup_and_augmentation_is_exact_to_the_bit(finetuned, finetuning, tmp_path):
    out = Path(shutil.copytree(finetuned, tmp_path / "run"))
    for name in ("checkpoints/step-00000006", "model"):
        shutil.rmtree(out / name)
    for name in ("summary.json", "evaluation.json"):
        (out / name).unlink()
    assert main([*finetuning, "--out", str(out)]) == 0
    ours, theirs = (
        [(entry["step"], entry["loss"], entry["gradient_norm"]) for entry in read_metrics(folder / "metrics.jsonl")]
        for folder in (out, finetuned)
    )
    assert ours == theirs
    for name in ("model/model.safetensors", "evaluation.json"):
        assert (out / name).read_bytes() == (finetuned / name).read_bytes()


def test_a_finished_run_returns_its_summary(finetuned, finetuning):
    config = parse(FinetuneConfig, "finetune", [*finetuning[1:], "--out", str(finetuned)])
    assert finetune(config) == json.loads((finetuned / "summary.json").read_text())


@pytest.mark.parametrize("mixing", [MixingConfig(), MixingConfig(mixup=0.8)])
def test_the_loss_is_computed_in_full_precision_whatever_the_model_returns(mixing):
    clips = torch.randint(0, 256, (2, 2, 4, 4, 3), dtype=torch.uint8)
    logits = torch.tensor([[8.0, 1.0, 0.0], [0.5, 9.0, 2.0]], dtype=torch.bfloat16)
    objective = build_objective(mixing, ClipConfig(), classes=3)
    assert objective(lambda clips: logits, Batch(clips, torch.tensor([0, 1]), *[None] * 5)).dtype == torch.float32


def test_a_run_goes_on_from_its_own_encoder_and_with_its_own_head_only(
    finetuned, finetuning, pretrained, tmp_path, capsys
):
    out = Path(shutil.copytree(finetuned, tmp_path / "run"))
    more = [*finetuning, "--out", str(out), "--steps", "8"]
    said = refusal(capsys, [*more, "--head.pool", "mean"])
    assert re.search("head.pool: is mean, but .*step-00000006 was written with class_token", said)
    other = Path(shutil.copytree(pretrained / "encoder", tmp_path / "encoder"))
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, other / "model.safetensors")
    said = refusal(capsys, [*more, "--encoder", str(other)])
    assert re.search("encoder: is [0-9a-f]{64}, but .*step-00000006 was written with [0-9a-f]{64}", said)


def test_a_step_draws_the_same_mixture_whatever_was_drawn_before():
    batch = Batch(
        torch.arange(4 * 2 * 8 * 8 * 3).remainder(256).byte().view(4, 2, 8, 8, 3), torch.arange(4), *[None] * 5
    )
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=4)

    def mixed(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        seed_draws(seed=3, step=step, rank=0, micro_batch=1)
        return mix(mixup, batch, ClipConfig())

    first = mixed(7)
    np.random.random(5)
    assert not torch.equal(mixed(8)[1], first[1])
    again = mixed(7)
    assert torch.equal(again[0], first[0])
    assert torch.equal(again[1], first[1])
    assert torch.allclose(first[1].sum(1), torch.ones(4))


def test_an_unmixed_clip_is_normalised_as_the_encoder_normalises_it():
    clips = torch.randint(0, 256, (2, 2, 4, 4, 3), dtype=torch.uint8)
    batch = Batch(clips, torch.tensor([0, 1]), *[None] * 5)
    clip = ClipConfig()
    mixed, _ = mix(Mixup(mixup_alpha=0.8, prob=0.0, num_classes=2), batch, clip)
    expected = (clips / 255 - torch.tensor(clip.mean)) / torch.tensor(clip.std)
    assert torch.allclose(mixed, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--architecture.width", "64", "architecture.width: is 64, but the encoder in"),
        ("--data.clip.frames", "7", "data.clip.frames: 7 frames do not divide into tubelets of 2"),
        ("--data.clip.mean", "[0.1,0.1,0.1]", "data.clip.mean: is (0.1, 0.1, 0.1), but the encoder in"),
        ("--data.micro_batch", "1", "data.micro_batch: mixup pairs a micro-batch's samples, and 1 is odd"),
        ("--architecture.drop_path", "0.1", "architecture.drop_path: is not read in finetuning; give drop_path"),
        ("--drop_path", "1.5", "drop_path: 1.5 must be at least 0"),
        ("--encoder", "/nowhere", "/nowhere: holds no encoder"),
        ("--head.dropout", "1", "head.dropout: 1.0 must be"),
        ("--views.spatial", "0", "views.temporal, views.spatial: must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(finetuning, tmp_path, capsys, option, value, message):
    said = refusal(capsys, [*finetuning, "--out", str(tmp_path / "run"), option, value])
    assert message in said
    assert not (tmp_path / "run").exists()


def test_repeats_do_not_make_up_for_an_odd_micro_batch_whose_middle_sample_would_be_mixed_with_itself(
    finetuning, pretrained, tmp_path, capsys
):
    odd = ["--data.micro_batch", "1", "--data.repeats", "2"]
    said = refusal(capsys, [*finetuning, "--out", str(tmp_path / "run"), *odd])
    assert "data.micro_batch: mixup pairs a micro-batch's samples, and 1 is odd" in said
    assert main([*finetuning, "--out", str(tmp_path / "run"), *odd, "--mixing.mixup=0", "--mixing.cutmix=0"]) == 0
    assert f"starting from {pretrained / 'encoder'}\n" in capsys.readouterr().err


def test_weights_of_another_shape_than_their_description_are_refused(finetuning, pretrained, tmp_path, capsys):
    folder = Path(shutil.copytree(pretrained / "encoder", tmp_path / "encoder"))
    content = json.loads((folder / "config.json").read_text())
    content["encoder"]["depth"] = 2
    (folder / "config.json").write_text(json.dumps(content))
    said = refusal(capsys, [*finetuning, "--out", str(tmp_path / "run"), "--encoder", str(folder)])
    assert "is an encoder of another shape: it lacks blocks.1." in said


def test_shards_without_labels_or_with_other_classes_are_refused(finetuning, packed_shards, tmp_path, capsys):
    unlabelled = tmp_path / "unlabelled"
    videos = str(packed_shards.parent / "videos")
    assert main(["pack", "--short-side", "32", "--jobs=1", videos, str(unlabelled), "--unlabelled"]) == 0
    said = refusal(capsys, [*finetuning, "--out", str(tmp_path / "run"), "--data.shards", str(unlabelled)])
    assert f"{unlabelled}: has no labels; pack it from class folders or with --list" in said
    other = Path(shutil.copytree(packed_shards, tmp_path / "other"))
    content = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps(content | {"classes": ["jump", "sing"]}))
    said = refusal(capsys, [*finetuning, "--out", str(tmp_path / "run"), "--validation.shards", str(other)])
    assert "its classes jump, sing ... are not the model's jump, run" in said
    (other / "index.json").write_text(json.dumps(content | {"classes": ["jump"]}))
    said = refusal(capsys, [*finetuning, "--out", str(tmp_path / "run"), "--data.shards", str(other)])
    assert re.search(rf"{other}/shard-0+\d\.idx: sample \S+ has label 1, but the classes are 0 to 0; make", said)


def test_an_encoder_is_finetuned_at_other_frames_rates_and_sizes_than_it_was_pretrained_at(
    finetuning, pretrained, tmp_path
):
    clip = ["--data.clip.frames", "6", "--data.clip.size", "32", "--data.clip.frame_rate", "6"]
    assert main([*finetuning, "--out", str(tmp_path / "run"), *clip, "--steps", "4"]) == 0
    content = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["clip"]
    assert (content["frames"], content["size"], content["frame_rate"], content["stride"]) == (6, 32, 6.0, None)
    assert json.loads((pretrained / "encoder" / "config.json").read_text())["clip"]["frames"] == 4
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["samples"] == 11


def test_training_from_scratch_needs_an_architecture(finetuning, tmp_path, capsys):
    scratch = [*finetuning, "--out", str(tmp_path / "run"), "--encoder", "null"]
    assert "encoder: is missing; give a pretraining run, or an architecture" in refusal(capsys, scratch)
    architecture = ["--architecture", "{width: 32, depth: 1, heads: 2, tubelet: [2, 8, 8], name: factorised_encoder}"]
    layers = ["--optimizer.layer_decay", "0.75", "--head.hidden", "[16]", "--steps", "4"]
    assert main([*scratch, *architecture, *layers]) == 0
    assert "training from scratch\n" in capsys.readouterr().err
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
