"""Runs with the convolutional stem: it learns in pretraining, and its encoder folder starts a finetuning run."""

import json
from pathlib import Path

import pytest

from finetune.classifier import load
from launch.cli import main
from pretrain.engine.tracking import read_metrics
from pretrain.model.residual_attention import ConvolutionalTubeletEmbedding
from tests.runs import tiny_pretraining

pytestmark = pytest.mark.xdist_group("stem runs")  # one worker, which makes once what these tests share

STEPS = 24


@pytest.fixture(scope="module")
def pretrained_stem(packed_shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stem") / "run"
    recipe = tiny_pretraining(out.parent, packed_shards)
    command = ["pretrain", "--config", str(recipe), "--encoder.stem", "residual_attention"]
    assert main([*command, "--out", str(out), "--steps", str(STEPS)]) == 0
    return out


def test_the_loss_of_a_run_with_the_stem_falls(pretrained_stem):
    losses = [entry["loss"] for entry in read_metrics(pretrained_stem / "metrics.jsonl")]
    assert len(losses) == STEPS
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])


def test_a_classifier_with_attention_pooling_starts_from_the_encoder_and_keeps_its_stem(
    finetuning, pretrained_stem, tmp_path
):
    described = json.loads((pretrained_stem / "encoder" / "config.json").read_text())
    assert described["encoder"]["stem"] == "residual_attention"
    command = [*finetuning, "--out", str(tmp_path / "run"), "--encoder", str(pretrained_stem)]
    assert main([*command, "--head.pool", "attention"]) == 0
    model, description = load(tmp_path / "run")
    assert (description.encoder.stem, description.head.pool) == ("residual_attention", "attention")
    assert isinstance(model.encoder.embedding, ConvolutionalTubeletEmbedding)


def test_an_encoder_with_the_stem_is_no_start_for_one_without(finetuning, pretrained_stem, tmp_path, capsys):
    recipe = tiny_pretraining(tmp_path, tmp_path)
    shards = finetuning[finetuning.index("--validation.shards") + 1]
    command = ["pretrain", "--config", str(recipe), "--data.shards", shards, "--out", str(tmp_path / "run")]
    assert main([*command, "--steps", "4", "--init", str(pretrained_stem)]) == 2
    assert "encoder.stem: is linear, but the encoder in" in capsys.readouterr().err
