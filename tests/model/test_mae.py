"""The masked autoencoder: what its loss sees, VideoMAE's targets, gradients everywhere, and that it learns."""

import dataclasses

import pytest
import torch
from torch import Tensor

from pretrain.errors import Refused
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import ENCODERS, build_encoder
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder
from pretrain.model.masking import MaskConfig, draw_mask
from pretrain.model.positions import POSITIONS
from pretrain.model.tubelets import cut_tubelets
from tests.tokens import take_tokens
from tests.videos import moving_square

ENCODER = EncoderConfig(width=48, depth=2, heads=2, temporal_depth=1, tubelet=(2, 8, 8))
DECODER = DecoderConfig(width=32, depth=2, heads=2)
FRAMES, SIZE, TUBELET_VALUES = 6, 32, 2 * 8 * 8 * 3
NAMES = pytest.mark.parametrize("name", list(ENCODERS))


def model_of(name: str = "joint", **decoder) -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = build_encoder(dataclasses.replace(ENCODER, name=name), FRAMES, SIZE)
    return MaskedAutoencoder(encoder, dataclasses.replace(DECODER, **decoder))


def clips_of(count: int = 2) -> Tensor:
    shape = (count, FRAMES, SIZE, SIZE, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def masks_of(model: MaskedAutoencoder, count: int = 2, decoded: float = 1.0) -> tuple[Tensor, Tensor]:
    config = MaskConfig("tube", 0.75, decoded)
    drawn = [draw_mask(config, model.encoder.grid, key, key) for key in range(count)]
    return tuple(torch.stack([torch.from_numpy(part) for part in parts]) for parts in zip(*drawn, strict=True))


def changed_at(clips: Tensor, token: int) -> Tensor:
    """The clips with other pixels in one tubelet of the first clip."""
    slot, position = divmod(token, 16)
    row, column = divmod(position, 4)
    changed = clips.clone()
    changed[0, 2 * slot : 2 * slot + 2, 8 * row : 8 * row + 8, 8 * column : 8 * column + 4] ^= 255
    return changed


@NAMES
def test_the_loss_sees_the_visible_tubelets_and_those_to_reconstruct_and_nothing_else(name):
    model, clips = model_of(name).eval(), clips_of()
    visible, masked = masks_of(model, decoded=0.5)
    before = model(clips, visible, masked)
    unread = sorted(set(range(48)) - set(visible[0].tolist()) - set(masked[0].tolist()))
    assert len(unread) == 18
    same = model(changed_at(clips, unread[4]), visible, masked)
    assert torch.equal(same.loss, before.loss)
    target = model(changed_at(clips, int(masked[0, 3])), visible, masked)
    assert torch.equal(target.prediction, before.prediction), "a prediction must not see its target"
    assert target.loss[0] != before.loss[0]
    assert target.loss[1] == before.loss[1]
    seen = model(changed_at(clips, int(visible[0, 3])), visible, masked)
    assert not torch.equal(seen.prediction[0], before.prediction[0])
    assert torch.equal(seen.prediction[1], before.prediction[1])


def test_the_loss_is_the_mean_squared_error_of_each_clip():
    model, clips = model_of(), clips_of()
    visible, masked = masks_of(model)
    loss, prediction = model(clips, visible, masked)
    error = (prediction - model.targets(clips, masked)) ** 2
    assert prediction.shape == (2, 36, TUBELET_VALUES)
    torch.testing.assert_close(loss, torch.stack([error[0].mean(), error[1].mean()]))


def test_targets_are_normalised_in_each_tubelet_and_channel():
    """VideoMAE's engine_for_pretraining: (x - mean) / (sqrt(unbiased variance) + 1e-6) over the pixels of a tubelet."""
    model, clips = model_of(), clips_of()
    _, masked = masks_of(model)
    targets = model.targets(clips, masked).unflatten(-1, (2, 8, 8, 3))
    for b in range(2):
        for place, token in enumerate(masked[b].tolist()):
            slot, position = divmod(token, 16)
            row, column = divmod(position, 4)
            block = clips[b, 2 * slot : 2 * slot + 2, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] / 255
            mean, deviation = block.mean((0, 1, 2)), block.var((0, 1, 2), unbiased=True).sqrt()
            torch.testing.assert_close(targets[b, place], (block - mean) / (deviation + 1e-6), atol=1e-5, rtol=1e-5)


def test_a_plain_tubelet_has_a_target_of_zeros():
    model = model_of()
    targets = model.targets(torch.full((1, FRAMES, SIZE, SIZE, 3), 200, dtype=torch.uint8), torch.arange(48)[None])
    assert targets.abs().max() < 0.2, "finite, though the deviation is zero"


def test_plain_targets_are_pixels_between_0_and_1():
    model, clips = model_of(targets="pixels"), clips_of()
    _, masked = masks_of(model)
    expected = take_tokens(cut_tubelets(clips, (2, 8, 8)), masked) / 255
    torch.testing.assert_close(model.targets(clips, masked), expected)


def test_the_targets_of_a_subset_are_rows_of_all_targets():
    model, clips = model_of(), clips_of()
    _, everything = masks_of(model)
    _, some = masks_of(model, decoded=0.5)
    rows = torch.searchsorted(everything, some)
    assert torch.equal(model.targets(clips, some), take_tokens(model.targets(clips, everything), rows))


@NAMES
def test_a_decoded_subset_is_predicted_from_the_visible_tokens_and_its_own_mask_tokens(name):
    """Without decoder blocks nothing mixes, so it is rows of the whole; with them, fewer mask tokens take part."""
    for depth, is_the_same in ((0, True), (2, False)):
        model, clips = model_of(name, depth=depth).eval(), clips_of()
        visible, everything = masks_of(model)
        _, some = masks_of(model, decoded=0.5)
        rows = take_tokens(model(clips, visible, everything).prediction, torch.searchsorted(everything, some))
        subset = model(clips, visible, some).prediction
        assert subset.shape == (2, 18, TUBELET_VALUES)
        assert torch.allclose(subset, rows, atol=1e-6) == is_the_same


def test_masked_tokens_are_told_apart_by_their_positions():
    model, clips = model_of().eval(), clips_of()
    prediction = model(clips, *masks_of(model)).prediction
    assert torch.pdist(prediction[0]).min() > 1e-3


def test_a_prediction_belongs_to_the_number_of_its_token():
    """The order in which tokens are listed must not matter: only their numbers tell where they stand."""
    model, clips = model_of().eval(), clips_of()
    visible, masked = masks_of(model)
    shuffled = torch.randperm(masked.shape[1], generator=torch.Generator().manual_seed(0))
    mixed = model(clips, visible.flip(1), masked[:, shuffled])
    straight = model(clips, visible, masked)
    torch.testing.assert_close(mixed.prediction, straight.prediction[:, shuffled], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.loss, straight.loss)


@NAMES
def test_a_gradient_reaches_every_parameter(name):
    torch.manual_seed(0)
    encoder = build_encoder(dataclasses.replace(ENCODER, name=name, positions="learned"), FRAMES, SIZE)
    model = MaskedAutoencoder(encoder, DECODER)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    visible, masked = masks_of(model)
    model(clips_of(), visible, masked).loss.mean().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name == "encoder.blocks.0.message_attention.query_bias":
            continue  # the first messages are alike, so that no query prefers any
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 1e-8, parameter_name


@NAMES
def test_the_loss_falls_when_trained_on_two_clips(name):
    model = model_of(name)
    clips = torch.stack([torch.from_numpy(moving_square(FRAMES, SIZE, SIZE, seed)) for seed in (1, 2)])
    visible, masked = masks_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(clips, visible, masked).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_loss_is_computed_in_full_precision_under_autocast():
    model, clips = model_of(), clips_of()
    visible, masked = masks_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, prediction = model(clips, visible, masked)
    assert (loss.dtype, prediction.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss, model(clips, visible, masked).loss, atol=0.05, rtol=0.05)


@NAMES
@pytest.mark.parametrize("positions", POSITIONS)
def test_halved_weights_train_beside_fixed_tables_in_full_precision(name, positions):
    """DeepSpeed puts parameters into bf16 and leaves buffers as they are."""
    torch.manual_seed(0)
    encoder = build_encoder(dataclasses.replace(ENCODER, name=name, positions=positions), FRAMES, SIZE)
    model, clips = MaskedAutoencoder(encoder, DECODER), clips_of()
    visible, masked = masks_of(model)
    expected = model(clips, visible, masked).loss
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    loss, prediction = model(clips, visible, masked)
    loss.mean().backward()
    assert (loss.dtype, prediction.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("config", [DecoderConfig(width=33, heads=3), DecoderConfig(width=32, heads=3)])
def test_a_decoder_whose_sizes_do_not_divide_is_refused(config):
    with pytest.raises(Refused, match=rf"decoder\.width: {config.width} .* decoder\.heads 3"):
        config.validate()
    DecoderConfig().validate()


@pytest.mark.parametrize(("field", "value"), [("width", -2), ("depth", 0), ("heads", 0), ("mlp_ratio", 0.5)])
def test_a_decoder_with_a_size_below_one_is_refused(field, value):
    with pytest.raises(Refused, match=rf"^decoder\.{field}: {value} must be at least 1"):
        DecoderConfig(**{field: value}).validate()
