"""Export: one file that computes the classifier's logits without Tubelet, or no file."""

import json

import pytest
import torch

import finetune
from finetune import export as export_module
from finetune.classifier import ModelDescription, save_classifier
from finetune.config import HeadConfig
from finetune.export import random_clips
from launch.cli import main
from pretrain.data.clips import ClipConfig
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import ENCODERS


@pytest.mark.parametrize("name", ENCODERS)
def test_a_program_gives_the_logits_of_its_model_for_any_number_of_clips(name, tmp_path, capsys):
    description = ModelDescription(
        EncoderConfig(name, "Ti", depth=1, width=48, heads=4, temporal_depth=1, tubelet=(2, 16, 16)),
        ClipConfig(frames=4, frame_rate=7.5, size=32),
        HeadConfig(pool="class_token" if name != "joint" else "attention", hidden=(16,), init_scale=1.0),
        ("jump", "run", "sit"),
        short_side=36,
        frame_rate=None,
    )
    torch.manual_seed(0)
    model = description.build(description.build_encoder())
    save_classifier(tmp_path / "model", dict(model.state_dict()), description)
    out = tmp_path / "model.pt2"
    assert main(["export", str(tmp_path / "model"), str(out)]) == 0
    told = {"tubelet.json": ""}
    program = torch.export.load(out, extra_files=told).module()
    assert json.loads(told["tubelet.json"])["classes"] == ["jump", "run", "sit"]
    clips = random_clips(description, 5)
    with torch.no_grad():
        expected = finetune.load(tmp_path / "model").model.cpu()(clips)
        assert expected.std() > 0.01
        torch.testing.assert_close(program(clips), expected, atol=1e-4, rtol=0)


def test_a_program_that_differs_from_its_model_is_not_kept(finetuned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_module, "TOLERANCE", -1.0)  # which no difference reaches
    out = tmp_path / "model.pt2"
    assert main(["export", str(finetuned), str(out)]) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_name_one_that_is_there_and_an_encoder_are_refused(finetuned, pretrained, tmp_path, capsys):
    there = tmp_path / "there.pt2"
    there.touch()
    for model, out, message in (
        (finetuned, tmp_path / "model.onnx", "give NAME.pt2"),
        (finetuned, there, "is there already"),
        (finetuned, tmp_path / "none" / "model.pt2", "cannot be written"),
        (pretrained / "encoder", tmp_path / "model.pt2", "is an encoder, not a classifier"),
    ):
        assert main(["export", str(model), str(out)]) == 2
        assert message in capsys.readouterr().err
    assert there.stat().st_size == 0
