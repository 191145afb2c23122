"""Position embeddings, against the table that VideoMAE uses."""

import math

import pytest
import torch
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from pretrain.model.positions import PositionEmbedding, sincos_table

KINDS = pytest.mark.parametrize("kind", ["sincos", "learned"])


@pytest.mark.parametrize(("length", "width"), [(1568, 96), (8, 64), (32, 48), (1, 2)])
def test_the_table_is_videomaes(length, width):
    torch.testing.assert_close(
        sincos_table(length, width), get_sinusoid_encoding_table(length, width)[0], atol=1e-6, rtol=0
    )


def test_the_table_is_sines_at_even_and_cosines_at_odd_channels():
    table = sincos_table(4, 4)
    assert table[0].tolist() == [0, 1, 0, 1]
    expected = [math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)]
    torch.testing.assert_close(table[3], torch.tensor(expected))


@KINDS
def test_a_token_gets_the_position_of_its_number(kind):
    torch.manual_seed(0)
    positions, tokens = PositionEmbedding(kind, 6, 8), torch.randn(2, 6, 8)
    full = positions(tokens)
    torch.testing.assert_close(full - tokens, positions.table.expand(2, -1, -1))
    numbers = torch.tensor([[0, 2, 5], [1, 3, 4]])
    some = positions(tokens[:, :3], numbers)
    expected = torch.stack([tokens[b, :3] + positions.table[0, numbers[b]] for b in range(2)])
    torch.testing.assert_close(some, expected)
    torch.testing.assert_close(positions.of(numbers), expected - tokens[:, :3])


@KINDS
def test_all_numbers_in_turn_are_the_same_as_none_given(kind):
    positions, tokens = PositionEmbedding(kind, 6, 8), torch.randn(2, 6, 8)
    assert torch.equal(positions(tokens), positions(tokens, torch.arange(6).expand(2, -1)))


def test_only_learned_positions_are_weights():
    assert set(PositionEmbedding("learned", 6, 8).state_dict()) == {"table"}
    fixed = PositionEmbedding("sincos", 6, 8)
    assert not fixed.state_dict()
    assert not list(fixed.parameters())


def test_learned_positions_start_small_and_distinct():
    torch.manual_seed(0)
    table = PositionEmbedding("learned", 64, 64).table
    assert 0.015 < table.std() < 0.025
    assert len(table[0].unique(dim=0)) == 64
