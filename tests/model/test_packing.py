"""Packed clips against each clip alone: outputs, losses and gradients; empty places do nothing."""

import functools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from pretrain.data.clips import ClipConfig
from pretrain.data.packed_sequences import fill_sequences, tokens_of
from pretrain.data.sequence_plan import ClipGrid, ClipSizing, Masks, Packing
from pretrain.errors import Refused
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import build_encoder
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder
from pretrain.model.masking import MaskConfig
from pretrain.model.packing import (
    PackedMaskedAutoencoder,
    PackedTokens,
    decoded_places,
    draw_packed_mask,
    encode_packed,
    packed_counts,
    pool_segments,
    refuse_unpackable,
)
from pretrain.model.positions import WITH_COORDINATES
from pretrain.packing import decoded_tokens, visible_tokens

TUBELET = (2, 4, 4)
GRIDS = (ClipGrid(2, 2, 3), ClipGrid(1, 3, 2), ClipGrid(3, 1, 2), ClipGrid(3, 3, 3))
MASK = MaskConfig(name="random", ratio=0.6, decoded=0.7)
MASKS = Masks(functools.partial(packed_counts, MASK), functools.partial(draw_packed_mask, MASK))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def packing_of(tokens: int, decoded: int) -> Packing:
    sizing = ClipSizing(ClipConfig(frames=6, stride=1, size=12), 1.0, TUBELET)
    return Packing(sizing, 2, tokens, decoded, MASKS)


def clips() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, 256, (2 * s, 4 * r, 4 * c, 3), dtype=torch.uint8) for s, r, c in GRIDS]


def packed(places: tuple[int, int] | None = None) -> tuple[PackedTokens, PackedTokens]:
    """Two sequences of two clips each; the second has no empty place unless `places` gives more."""
    tokens, decoded = places or (14, 13)
    packing = packing_of(tokens, decoded)
    cut = [
        tokens_of(clip, grid, grid.tokens, packing, 0, number, 100 + number)
        for number, (clip, grid) in enumerate(zip(clips(), GRIDS, strict=True))
    ]
    sequences = fill_sequences([cut[:2], cut[2:]], packing)
    return visible_tokens(sequences), decoded_tokens(sequences)


def model_of(positions: str, attention: str) -> PackedMaskedAutoencoder:
    torch.manual_seed(0)
    config = EncoderConfig(width=24, depth=2, heads=2, tubelet=TUBELET, positions=positions)
    encoder = build_encoder(config, 6, 12)
    return PackedMaskedAutoencoder(encoder, DecoderConfig(width=16, depth=2, heads=2, attention=attention))


def weights_for(model: PackedMaskedAutoencoder, grid: ClipGrid) -> dict[str, Tensor]:
    """The weights of the model of one clip: learned tables are cut to its grid, all others are the same tensors."""
    weights = dict(model.named_parameters())
    for name, axis in (("slots", 0), ("rows", 1), ("columns", 2)):
        if f"encoder.positions.{name}" in weights:
            weights[f"encoder.positions.{name}"] = weights[f"encoder.positions.{name}"][:, : grid[axis]]
    places = weights.get("encoder.positions.places")
    if places is not None:
        in_grid = places.unflatten(1, (3, 3))[:, : grid.rows, : grid.columns]
        weights["encoder.positions.places"] = in_grid.flatten(1, 2)
    return weights


def alone(model: PackedMaskedAutoencoder, number: int) -> tuple[Tensor, Tensor]:
    """What the plain model of one clip's own grid makes of it: the encoder's tokens, the sum of its token losses."""
    grid, clip = GRIDS[number], clips()[number][None]
    own = build_encoder(model.encoder.config, len(clip[0]), (4 * grid.rows, 4 * grid.columns))
    plain = MaskedAutoencoder(own, model.config)
    weights = weights_for(model, grid)
    visible, masked = (
        torch.from_numpy(part)[None] for part in draw_packed_mask(MASK, grid.tokens, number, 100 + number)
    )
    encoder_weights = {name.removeprefix("encoder."): value for name, value in weights.items() if "encoder." in name}
    tokens = functional_call(own, encoder_weights, (clip, visible)).tokens[0]
    loss = functional_call(plain, weights, (clip, visible, masked)).loss.sum() * masked.shape[1]
    return tokens, loss


@pytest.mark.parametrize("positions", WITH_COORDINATES)
@pytest.mark.parametrize("attention", ["joint", "cross"])
def test_packed_clips_give_what_each_gives_alone(positions, attention):
    model = model_of(positions, attention)
    visible, decoded = packed()
    encoded = encode_packed(model.encoder, visible)
    losses = model(visible, decoded).loss
    expected = [alone(model, number) for number in range(len(GRIDS))]
    for number, (tokens, loss) in enumerate(expected):
        sequence, segment = divmod(number, 2)
        own = encoded[sequence][visible.segments[sequence] == segment]
        torch.testing.assert_close(own, tokens, **CLOSE)
        torch.testing.assert_close(losses[sequence][decoded.segments[sequence] == segment].sum(), loss, **CLOSE)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad(sum(loss for _, loss in expected), parameters, allow_unused=True)
    for (name, _), our, their in zip(model.named_parameters(), ours, theirs, strict=True):
        assert (our is None) == (their is None), name
        if our is not None:
            torch.testing.assert_close(our, their, **CLOSE, msg=name)


@pytest.mark.parametrize("attention", ["joint", "cross"])
def test_empty_places_do_nothing_whatever_lies_in_them(attention):
    model = model_of("factorised", attention)
    results = []
    for places in (None, (17, 29)):
        visible, decoded = packed(places)
        if places:
            for part in (visible, decoded):
                empty = part.segments < 0
                part.tubelets[empty] = 255
                part.coordinates[empty] = 2
        reconstruction = model(visible, decoded)
        assert (reconstruction.loss[decoded.segments < 0] == 0).all()
        losses = reconstruction.loss[decoded.segments >= 0]
        results.append((losses.detach(), torch.autograd.grad(losses.sum(), model.parameters())))
    torch.testing.assert_close(results[0][0], results[1][0])
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_sequence_without_an_empty_place_gives_finite_gradients_to_all():
    model = model_of("sincos_3d", "cross")
    visible, decoded = packed((14, 25))
    assert (visible.segments[1] >= 0).all()
    assert (decoded.segments < 0).any(1).all()
    model(visible, decoded).loss.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_segments_are_pooled_apart():
    tokens = torch.arange(12.0).view(1, 6, 2)
    pooled = pool_segments(tokens, torch.tensor([[0, 0, 1, -1, 1, -1]]), 3)
    torch.testing.assert_close(pooled, torch.tensor([[[1.0, 2.0], [6.0, 7.0], [0.0, 0.0]]]))


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9, 0.95])
@pytest.mark.parametrize("decoded", [0.3, 1.0])
def test_decoded_tokens_always_find_a_place(ratio, decoded):
    mask = MaskConfig(name="random", ratio=ratio, decoded=decoded)
    generator = np.random.default_rng(0)
    for _ in range(50):
        counts = [packed_counts(mask, int(kept)) for kept in generator.integers(1, 400, 6)]
        visible, asked = (sum(part) for part in zip(*counts, strict=True))
        assert asked <= decoded_places(mask, visible)


@pytest.mark.parametrize(
    ("encoder", "mask", "message"),
    [
        ({"name": "factorised_encoder"}, {}, "encoder.name: factorised_encoder cannot take the clips of data.packing"),
        ({"positions": "sincos"}, {}, "encoder.positions: sincos is for one token grid, but data.packing gives"),
        ({"positions": "learned"}, {}, "encoder.positions: learned is for one token grid, but data.packing gives"),
        (
            {},
            {"decoded": 0.5, "decoded_pattern": "running_cell"},
            "mask.decoded_pattern: running_cell is for clips of ",
        ),
        ({}, {"name": "tube"}, "mask.name: tube is for clips of one size, not for those of data.packing; use random"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_both_names(encoder, mask, message):
    config = EncoderConfig(**({"positions": "sincos_3d"} | encoder))
    with pytest.raises(Refused) as refused:
        refuse_unpackable(config, "encoder", MaskConfig(**({"name": "random"} | mask)))
    assert str(refused.value).startswith(message)
