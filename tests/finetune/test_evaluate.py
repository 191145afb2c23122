"""Evaluation: each video once in any world, views averaged, and videos that cannot be decoded counted as errors."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.classifier import load
from finetune.config import ViewsConfig
from finetune.evaluate import cutter_of, evaluate_on
from launch.cli import main
from pretrain.data.shards import ShardSet
from pretrain.data.views import EvaluationViews
from pretrain.engine.distributed import Processes


def test_pyav_finds_what_decord_finds_and_never_asks_for_it(finetuned, packed_shards, tmp_path, monkeypatch):
    command = ["evaluate", "--model", str(finetuned), "--shards", str(packed_shards), "--workers", "0"]
    assert main([*command, "--out", str(tmp_path / "decord"), "--decoder", "decord"]) == 0
    monkeypatch.setitem(sys.modules, "decord", None)
    assert main([*command, "--out", str(tmp_path / "pyav"), "--decoder", "pyav"]) == 0
    by_decord, by_pyav = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("decord", "pyav"))
    assert by_decord == by_pyav


class Brightness(nn.Module):
    """A model whose logits are the mean brightness of the clip and a constant."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        brightness = clips.float().mean((1, 2, 3, 4))
        return torch.stack([brightness, torch.full_like(brightness, 100.0)], 1) / 10


def test_the_logits_of_a_videos_views_are_averaged(finetuned, packed_shards):
    shards = ShardSet.open(packed_shards)
    _, description = load(finetuned)
    views = ViewsConfig(temporal=2, spatial=3)
    with Processes() as processes:
        found = evaluate_on(
            Brightness(),
            cutter_of(shards, description, views),
            np.arange(shards.samples),
            description.classes,
            processes,
            micro_batch=4,
            workers=0,
        )
    cutter = EvaluationViews(shards, description.clip, 2, 3)
    for number, entry in enumerate(found.predictions):
        clips = cutter[number, True].clips
        assert clips.shape[0] == 6
        logits = torch.stack([Brightness()(clip[None])[0] for clip in clips]).mean(0)
        assert entry["probability"] == pytest.approx(logits.softmax(0).max().item(), abs=1e-4)
        assert entry["predicted"] == description.classes[int(logits.argmax())]


def test_a_video_that_cannot_be_decoded_is_listed_and_counted_as_wrong(finetuned, packed_shards, tmp_path):
    folder = Path(shutil.copytree(packed_shards, tmp_path / "shards"))
    shards = ShardSet.open(folder)
    with open(folder / shards.shards[0].name, "r+b") as file:
        file.seek(shards.shard_index(0).video_offsets[1] + 40)
        file.write(b"damage")
    out = tmp_path / "out"
    command = ["evaluate", "--model", str(finetuned), "--shards", str(folder), "--out", str(out), "--workers", "0"]
    assert main(command) == 0
    figures = json.loads((out / "evaluation.json").read_text())
    assert (figures["samples"], figures["errors"]) == (11, 1)
    assert (figures["model"], figures["shards"]) == (str(finetuned), str(folder))
    assert figures["fingerprint"] == shards.fingerprint
    assert figures["views"] == {"temporal": 1, "spatial": 1}
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    (broken,) = [entry for entry in predictions if "error" in entry]
    assert broken["key"] == shards.key(1)
    assert "its checksum differs" in broken["error"]
    right = sum(entry.get("predicted") == entry["label"] for entry in predictions)
    assert figures["top1"] == pytest.approx(right / 11)


def test_a_folder_that_cannot_be_written_is_refused_before_the_evaluation(finetuned, packed_shards, tmp_path, capsys):
    model = Path(shutil.copytree(finetuned / "model", tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    save_file({name: value * float("nan") for name, value in weights.items()}, model / "model.safetensors")
    command = ["evaluate", "--model", str(model), "--shards", str(packed_shards), "--workers", "0", "--out"]
    (tmp_path / "file").touch()
    for out, code, message in (
        (tmp_path / "file" / "folder", 2, f"tubelet: {tmp_path / 'file' / 'folder'}: cannot be written (Not a direc"),
        (tmp_path / "out", 3, "the model's logits are not finite (11 of 11 such videos)"),
    ):
        capsys.readouterr()
        assert main([*command, str(out)]) == code
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert message in said
    assert list((tmp_path / "out").iterdir()) == []


def test_sets_and_models_that_do_not_fit_are_refused_in_one_line(
    finetuned, pretrained, packed_shards, other_shards, tmp_path, capsys
):
    model = Path(shutil.copytree(finetuned / "model", tmp_path / "model"))
    (model / "model.safetensors").unlink()
    folder = Path(shutil.copytree(packed_shards, tmp_path / "shards"))
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(content | {"classes": ["run", "jump"]}))
    (tmp_path / "empty.txt").touch()
    for options, message in (
        (["--shards", other_shards], f"{other_shards}: has no labels; pack it from class folders or with --list"),
        (["--shards", folder], f"{folder}: its classes run, jump ... are not the model's jump, run"),
        (["--model", model], f"{model}: has no model.safetensors; give a model's folder"),
        (["--model", pretrained / "encoder"], "encoder: is an encoder, not a classifier; finetune it first"),
        (
            ["--split", tmp_path / "empty.txt"],
            f"split: {tmp_path / 'empty.txt'}: names no sample; write one key a line",
        ),
        (["--split", "test1"], f"split: test1 is no split of {packed_shards} and no file; pack with --split all"),
    ):
        capsys.readouterr()
        command = ["evaluate", "--model", finetuned, "--shards", packed_shards, "--out", tmp_path / "out", *options]
        assert main([str(part) for part in command]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert message in said
        assert not (tmp_path / "out").exists()


def test_a_stride_means_nothing_on_resampled_shards(finetuned, packed_shards, tmp_path, capsys):
    shards = tmp_path / "shards"
    assert main(["pack", str(packed_shards.parent / "videos"), str(shards), "--fps", "6", "--jobs", "1"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--model", str(finetuned), "--shards", str(shards)]) == 2
    assert f"data.clip.stride: shards {shards} was packed with --fps" in capsys.readouterr().err
