"""Effective rank and deviation of features, and the rule by which they count as collapsed."""

import pytest
import torch

from pretrain.collapse import Spread, collapse_of, effective_rank, feature_deviation, spread_of


def drawn(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_effective_rank_of_equally_strong_directions_is_their_number(rank):
    directions = torch.linalg.qr(drawn(16, rank)).Q.T
    assert effective_rank(directions.repeat(3, 1)) == pytest.approx(rank, rel=1e-4)


def test_the_figures_are_those_of_the_papers():
    features = drawn(40, 8)
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + 1e-7
    assert effective_rank(features) == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item())
    lengths = features.double().norm(dim=1, keepdim=True)
    expected = (features.double() / lengths).std(0, correction=0).mean() * 8**0.5
    assert feature_deviation(features) == pytest.approx(expected.item())


def test_isotropic_features_deviate_by_one_whatever_their_width_and_equal_ones_by_nothing():
    for width in (8, 256):
        assert feature_deviation(drawn(2000, width)) == pytest.approx(1, abs=0.03)
        constant = drawn(1, width).expand(50, -1)
        assert spread_of(constant) == pytest.approx((1, 0), abs=1e-4)


def test_noise_around_one_vector_is_a_collapse_although_it_has_full_rank_once_centred():
    features = 1 + 1e-3 * drawn(200, 32)
    assert effective_rank(features - features.mean(0)) > 25
    assert effective_rank(features) < 1.2
    assert collapse_of(spread_of(features), None) is not None
    assert collapse_of(spread_of(drawn(200, 32)), None) is None
    assert collapse_of(spread_of(torch.zeros(9, 4)), None) is not None


def test_features_are_compared_with_those_before_training_and_with_a_floor():
    before = Spread(rank=7.0, deviation=0.5)
    assert collapse_of(Spread(1.4, 0.03), before) is None
    assert collapse_of(Spread(1.4, 0.009), before) == "their deviation is 0.009, and was 0.5 before training"
    assert collapse_of(Spread(1.1, 0.6), before) == "their effective rank is 1.1, and was 7 before training"
    assert collapse_of(Spread(1.1, 0.009), None) is None
    assert collapse_of(Spread(1.1, 0.003), None) == "their deviation 0.003 is below 0.0039"
