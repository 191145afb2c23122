"""The nearest-neighbour probe."""

import pytest
import torch

from finetune.probe import features, knn_accuracy
from pretrain.data.shards import ShardSet
from pretrain.errors import Refused, StoppedByRule
from pretrain.weights import configs_from, encoder_from, load_encoder_weights, load_model_folder


def clusters(count: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % 3
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(3)[labels] * 5 + torch.randn(count, 3, generator=generator) * noise, labels


def test_separable_features_are_told_apart_perfectly_and_shuffled_labels_are_not():
    known, known_labels = clusters(60, 0.1, seed=0)
    asked, asked_labels = clusters(30, 0.1, seed=1)
    assert knn_accuracy(known, known_labels, asked, asked_labels) == 1.0
    assert knn_accuracy(known, known_labels, asked, (asked_labels + 1) % 3) == 0.0


def test_more_neighbours_than_samples_and_a_constant_feature_do_no_harm():
    known, labels = clusters(6, 0.1, seed=0)
    constant = torch.cat([known, torch.ones(6, 1)], 1)
    assert knn_accuracy(constant, labels, constant, labels, neighbours=50) == pytest.approx(1.0)


def test_the_features_of_a_set_are_one_row_a_video_in_order(pretrained, packed_shards):
    weights, content = load_model_folder(pretrained / "encoder")
    architecture, clip = configs_from(content, pretrained)
    encoder = encoder_from(architecture, clip)
    load_encoder_weights(encoder, weights, pretrained)
    shards = ShardSet.open(packed_shards)
    found, labels = features(encoder, shards, clip, micro_batch=4)
    assert found.shape == (11, 32)
    assert labels.tolist() == shards.labels()
    assert torch.allclose(features(encoder, shards, clip, micro_batch=3)[0], found, atol=1e-6)
    assert knn_accuracy(found, labels, found, labels, neighbours=1) == 1.0
    shards.resampled = True
    with pytest.raises(Refused, match=r"^data\.clip\.stride: shards .* was packed with --fps"):
        features(encoder, shards, clip)
    shards.resampled = False
    encoder.norm.weight.data.fill_(float("nan"))
    with pytest.raises(StoppedByRule, match="features are not finite"):
        features(encoder, shards, clip)
