"""Tubelets: the order of tokens and of the values inside, and the embedding against a 3D convolution."""

import pytest
import torch
from torch import nn

from pretrain.model.tubelets import Grid, TubeletEmbedding, cut_tubelets, grid_of, take_tubelets
from tests.tokens import take_tokens

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TUBELET = (2, 4, 8)
FRAMES, HEIGHT, WIDTH = 6, 12, 16


def clips_of(count: int = 2) -> torch.Tensor:
    shape = (count, FRAMES, HEIGHT, WIDTH, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def embedding() -> TubeletEmbedding:
    torch.manual_seed(1)
    module = TubeletEmbedding(TUBELET, 10, MEAN, STD)
    nn.init.normal_(module.projection.bias)
    return module


def test_token_n_stands_in_its_slot_row_and_column():
    clips = clips_of()
    tubelets = cut_tubelets(clips, TUBELET)
    grid = Grid(FRAMES // 2, HEIGHT // 4, WIDTH // 8)
    assert tubelets.shape == (2, grid.tokens, 2 * 4 * 8 * 3)
    for n in range(grid.tokens):
        slot, position = divmod(n, grid.positions)
        row, column = divmod(position, grid.columns)
        block = clips[:, 2 * slot : 2 * slot + 2, 4 * row : 4 * row + 4, 8 * column : 8 * column + 8]
        assert torch.equal(tubelets[:, n].unflatten(-1, (2, 4, 8, 3)), block)


def test_the_grid_counts_slots_rows_and_columns():
    grid = grid_of(16, 224, (2, 16, 32))
    assert grid == (8, 14, 7)
    assert (grid.positions, grid.tokens) == (98, 784)


def test_clips_in_any_memory_layout_are_cut_alike():
    clips = clips_of()
    channels_first = clips.permute(0, 4, 1, 2, 3).contiguous()
    assert torch.equal(cut_tubelets(channels_first.permute(0, 2, 3, 4, 1), TUBELET), cut_tubelets(clips, TUBELET))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_tubelets_that_are_asked_for_are_those_of_all_tubelets(dtype):
    clips, numbers = clips_of().to(dtype), torch.tensor([[0, 17, 4, 5, 5], [1, 2, 11, 16, 9]])
    expected = take_tokens(cut_tubelets(clips, TUBELET), numbers)
    assert torch.equal(take_tubelets(clips, numbers, TUBELET), expected)
    channels_first = clips.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    assert torch.equal(take_tubelets(channels_first, numbers, TUBELET), expected)


def test_taking_tokens_takes_each_clips_own():
    tokens = torch.arange(24).view(2, 4, 3)
    taken = take_tokens(tokens, torch.tensor([[0, 3], [2, 1]]))
    assert torch.equal(taken, torch.stack([tokens[0, [0, 3]], tokens[1, [2, 1]]]))


def test_the_embedding_is_a_3d_convolution_over_normalised_pixels():
    module, clips = embedding(), clips_of()
    convolution = nn.Conv3d(3, 10, TUBELET, TUBELET)
    with torch.no_grad():
        convolution.weight.copy_(module.projection.weight.unflatten(1, (*TUBELET, 3)).permute(0, 4, 1, 2, 3))
        convolution.bias.copy_(module.projection.bias)
    pixels = clips.permute(0, 4, 1, 2, 3) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    expected = convolution((pixels - mean) / std).flatten(2).transpose(1, 2)
    torch.testing.assert_close(module(clips), expected, atol=1e-5, rtol=1e-5)


def test_floats_are_taken_as_normalised_already():
    module, clips = embedding(), clips_of()
    normalised = (clips.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(module(normalised), module(clips), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(module(clips.float()), module(clips), atol=0.1)


def test_embedding_visible_tubelets_gives_the_rows_of_the_full_embedding():
    module, clips = embedding(), clips_of()
    visible = torch.tensor([[0, 4, 17], [3, 8, 9]])
    torch.testing.assert_close(module(clips, visible), take_tokens(module(clips), visible))


def test_hidden_pixels_have_no_influence_on_visible_tokens():
    module, clips = embedding(), clips_of(1)
    visible = torch.tensor([[0, 4]])
    before = module(clips, visible)
    changed = clips.clone()
    changed[:, 2:4, 4:8] = 0  # slot 1, row 1: tokens 8 and 9
    assert torch.equal(module(changed, visible), before)
    assert not torch.equal(module(changed, torch.tensor([[0, 8]])), module(clips, torch.tensor([[0, 8]])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tokens_have_the_type_of_the_weights(dtype):
    assert embedding().to(dtype)(clips_of()).dtype == dtype


def test_mean_and_deviation_are_no_weights():
    assert set(embedding().state_dict()) == {"projection.weight", "projection.bias"}
