"""Classifiers of Tubelet's own go through the conversion as they are."""

import dataclasses

import pytest
import torch

from finetune.classifier import ModelDescription, save_classifier
from finetune.config import HeadConfig
from finetune.conversion import as_classifier, read_model
from pretrain.data.clips import ClipConfig
from pretrain.model.encoder import EncoderConfig

CLIP = ClipConfig(frames=4, stride=1, size=16)
ENCODER = EncoderConfig(width=24, depth=1, heads=2, tubelet=(2, 8, 8), temporal_depth=1)


@pytest.mark.parametrize("name", ["joint", "factorised_encoder", "cross_frame"])
@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_a_classifier_comes_out_as_it_went_in(name, pool, tmp_path):
    torch.manual_seed(0)
    encoder = dataclasses.replace(ENCODER, name=name).resolved()
    description = ModelDescription(encoder, CLIP, HeadConfig(pool=pool, dropout=0.5), ("a", "b"), 48, 12.5)
    model = description.build(description.build_encoder())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    save_classifier(tmp_path, model.state_dict(), description)
    converted, told = read_model(tmp_path)
    weights, again = as_classifier(converted, told, converted.head.classes)
    assert again == description
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
