"""Export of a classifier with each encoder: the file computes the classifier's logits for any number of clips."""

import json

import pytest
import torch

import finetune
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
