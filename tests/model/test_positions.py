"""Position embeddings, against the table that VideoMAE uses."""

import math

import pytest
import torch
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from pretrain.model.positions import PositionEmbedding, position_table, sincos_table
from pretrain.model.tubelets import Grid

FIXED = ["sincos", "sincos_3d"]
KINDS = pytest.mark.parametrize("kind", [*FIXED, "learned"])
GRID = Grid(3, 2, 1)


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
    positions, tokens = PositionEmbedding(kind, GRID, 8), torch.randn(2, 6, 8)
    full = positions(tokens)
    torch.testing.assert_close(full - tokens, positions.table.expand(2, -1, -1))
    numbers = torch.tensor([[0, 2, 5], [1, 3, 4]])
    some = positions(tokens[:, :3], numbers)
    expected = torch.stack([tokens[b, :3] + positions.table[0, numbers[b]] for b in range(2)])
    torch.testing.assert_close(some, expected)
    torch.testing.assert_close(positions.of(numbers), expected - tokens[:, :3])


@KINDS
def test_all_numbers_in_turn_are_the_same_as_none_given(kind):
    positions, tokens = PositionEmbedding(kind, GRID, 8), torch.randn(2, 6, 8)
    assert torch.equal(positions(tokens), positions(tokens, torch.arange(6).expand(2, -1)))


@pytest.mark.parametrize("width", [48, 64, 384, 10])
def test_the_position_table_joins_the_tables_of_slot_row_and_column(width):
    grid = Grid(3, 2, 4)
    table = position_table("sincos_3d", grid, width)
    slot_width = width // 8 * 2
    row_width = (width - slot_width) // 4 * 2
    for n in range(grid.tokens):
        slot, position = divmod(n, grid.positions)
        row, column = divmod(position, grid.columns)
        parts = (
            sincos_table(grid.slots, slot_width)[slot],
            sincos_table(grid.rows, row_width)[row],
            sincos_table(grid.columns, width - slot_width - row_width)[column],
        )
        assert torch.equal(table[n], torch.cat(parts))


@pytest.mark.parametrize("kind", FIXED)
def test_a_small_temperature_tells_neighbours_on_a_small_grid_further_apart(kind):
    customary, small = (PositionEmbedding(kind, Grid(4, 2, 2), 96, degrees).table[0] for degrees in (10000.0, 20.0))
    assert torch.pdist(small).mean() > 1.3 * torch.pdist(customary).mean()
    assert sincos_table(5, 4, 100.0)[3].tolist() == pytest.approx(
        [math.sin(3), math.cos(3), math.sin(0.3), math.cos(0.3)]
    )


@pytest.mark.parametrize("kind", FIXED)
def test_no_two_tokens_of_a_clip_share_a_fixed_position(kind):
    table = PositionEmbedding(kind, Grid(8, 14, 14), 192).table[0]
    assert torch.pdist(table).min() > 0.1


def test_only_learned_positions_are_weights():
    assert set(PositionEmbedding("learned", GRID, 8).state_dict()) == {"table"}
    for kind in FIXED:
        fixed = PositionEmbedding(kind, GRID, 8)
        assert not fixed.state_dict()
        assert not list(fixed.parameters())


def test_learned_positions_start_small_and_distinct():
    torch.manual_seed(0)
    table = PositionEmbedding("learned", Grid(4, 4, 4), 64).table
    assert 0.015 < table.std() < 0.025
    assert len(table[0].unique(dim=0)) == 64
