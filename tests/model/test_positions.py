"""Position embeddings, against the table that VideoMAE uses."""

import math

import pytest
import torch
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from pretrain.model.positions import (
    POSITIONS,
    WITH_COORDINATES,
    PositionEmbedding,
    RotaryEmbedding,
    position_table,
    resampled,
    sincos_table,
)
from pretrain.model.tubelets import Grid, coordinates_of

FIXED = ["sincos", "sincos_3d"]
ADDED = [kind for kind in POSITIONS if kind != "rotary"]
KINDS = pytest.mark.parametrize("kind", ADDED)
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
    torch.testing.assert_close(full - tokens, positions.whole().expand(2, -1, -1))
    numbers = torch.tensor([[0, 2, 5], [1, 3, 4]])
    some = positions(tokens[:, :3], numbers)
    expected = torch.stack([tokens[b, :3] + positions.whole()[0, numbers[b]] for b in range(2)])
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


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        ("learned", {"table": 6}),
        ("separable", {"slots": 3, "places": 2}),
        ("factorised", {"slots": 3, "rows": 2, "columns": 1}),
        ("spatial", {"places": 2}),
    ],
)
def test_learned_positions_are_weights_one_table_for_each_factor(kind, lengths):
    positions = PositionEmbedding(kind, GRID, 8)
    assert {name: table.shape[1] for name, table in positions.state_dict().items()} == lengths
    whole = positions.whole().reshape(*GRID, 8)
    for slot, row, column in ((0, 0, 0), (2, 1, 0)):
        place = {"table": slot * 2 + row, "slots": slot, "rows": row, "columns": column, "places": row}
        expected = sum(table[0, place[name]] for name, table in positions.state_dict().items())
        torch.testing.assert_close(whole[slot, row, column].detach(), expected)


@pytest.mark.parametrize("kind", [kind for kind in WITH_COORDINATES if kind != "rotary"])
def test_coordinates_give_what_token_numbers_give(kind):
    grid, numbers = Grid(3, 4, 5), torch.tensor([[0, 7, 59], [21, 20, 42]])
    positions = PositionEmbedding(kind, grid, 24)
    torch.testing.assert_close(positions.at(coordinates_of(numbers, grid)), positions.of(numbers))


def test_rotary_positions_turn_pairs_by_slot_row_and_column_and_leave_the_rest():
    turns = RotaryEmbedding(14, temperature=100.0)(torch.tensor([[[2, 3, 5]]]), before=1, after=1)
    assert turns.cosine.shape == (1, 1, 3, 14)
    angles = torch.tensor([2, 0.2, 3, 0.3, 5, 0.5, 0])  # two pairs an axis, one pair is left
    torch.testing.assert_close(turns.cosine[0, 0, 1], angles.cos().repeat(2))
    torch.testing.assert_close(turns.sine[0, 0, 1], angles.sin().repeat(2))
    heads = torch.randn(1, 1, 3, 14)
    assert torch.equal(turns.turn(heads)[0, 0, [0, 2]], heads[0, 0, [0, 2]]), "tokens without a place do not turn"
    assert torch.allclose(turns.turn(heads).norm(dim=-1), heads.norm(dim=-1))


def test_rotary_angles_keep_their_digits_under_autocast():
    embedding, coordinates = RotaryEmbedding(64), torch.tensor([[[31, 63, 61]]])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = embedding(coordinates)
    assert torch.equal(rounded.cosine, embedding(coordinates).cosine)
    assert torch.equal(rounded.sine, embedding(coordinates).sine)


def test_resampled_tables_keep_what_is_even_and_follow_what_is_linear_in_time():
    old, new = Grid(4, 4, 4), Grid(8, 6, 3)
    even = {name: torch.full((1, length, 2), 3.0) for name, length in (("table", 64), ("places", 16), ("slots", 4))}
    for name, length in (("table", 144), ("places", 18), ("slots", 8)):
        table = resampled(even, old, new)[name]
        torch.testing.assert_close(table, torch.full((1, length, 2), 3.0))
    rising = {"slots": torch.arange(4.0).reshape(1, 4, 1)}
    longer = resampled(rising, old, new)["slots"].flatten()
    torch.testing.assert_close(longer[1:-1], torch.linspace(0.25, 2.75, 6))
    table = torch.randn(1, 64, 2)
    assert resampled({"table": table}, old, old)["table"] is table


def test_resampling_space_alone_treats_each_slot_as_an_image():
    table, old, new = torch.randn(1, 32, 3), Grid(2, 4, 4), Grid(2, 2, 6)
    slots = [resampled({"places": part}, Grid(1, 4, 4), Grid(1, 2, 6))["places"] for part in table.chunk(2, 1)]
    torch.testing.assert_close(resampled({"table": table}, old, new)["table"], torch.cat(slots, 1))


def test_fixed_positions_are_no_weights():
    for kind in [*FIXED, "rotary"]:
        fixed = PositionEmbedding(kind, GRID, 8)
        assert not fixed.state_dict()
        assert not list(fixed.parameters())


def test_learned_positions_start_small_and_distinct():
    torch.manual_seed(0)
    table = PositionEmbedding("learned", Grid(4, 4, 4), 64).table
    assert 0.015 < table.std() < 0.025
    assert len(table[0].unique(dim=0)) == 64
