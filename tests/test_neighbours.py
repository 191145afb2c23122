"""The nearest-neighbour probe."""

import pytest
import torch

from pretrain.neighbours import knn_accuracy, knn_shares


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


def test_a_video_that_asks_the_others_never_asks_itself(monkeypatch):
    monkeypatch.setattr("pretrain.neighbours.ASKED_AT_ONCE", 4)
    features, labels = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10)
    assert knn_accuracy(features, labels, features, labels, neighbours=1) == 1.0
    assert knn_accuracy(features, labels, features, labels, neighbours=1, leave_out_own=True) == 0.0
    shares = knn_shares(features, labels, features, 10, neighbours=50, leave_out_own=True)
    assert shares.diagonal().tolist() == [0.0] * 10
    assert torch.allclose(shares.sum(1), torch.ones(10))
