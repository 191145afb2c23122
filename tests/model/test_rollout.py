"""Attention rollout: the weights are those of the fused kernels, shares sum to 1, heat goes where keys are."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

from pretrain.model.attention import Attention, block_diagonal, causal_mask
from pretrain.model.encoder import Encoder, EncoderConfig
from pretrain.model.encoders import ENCODERS, build_encoder
from pretrain.model.packing import PackedTokens, encode_packed
from pretrain.model.rollout import Shares, compared, rollout, watching_attention
from pretrain.model.tubelets import cut_tubelets
from tests.tokens import attracting

TINY = EncoderConfig(width=48, depth=2, heads=2, temporal_depth=2, tubelet=(2, 8, 8))
FRAMES, SIZE, TOKENS = 6, 32, 48
NAMES = pytest.mark.parametrize("name", list(ENCODERS))


def encoder_of(name: str, class_token: bool = True, **fields) -> Encoder:
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, name=name, **fields)
    encoder = build_encoder(config, FRAMES, SIZE, class_token=class_token)
    with torch.no_grad():
        for parameter in encoder.parameters():  # far from even attention
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder.eval()


def clips_of(count: int = 2) -> Tensor:
    shape = (count, FRAMES, SIZE, SIZE, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def rolled_out(encoder: Encoder, clips: Tensor, read: Tensor | None = None) -> Shares:
    with watching_attention(encoder) as calls:
        encoder(clips)
    return rollout(encoder, calls, read)


def rebuilt(attention: Attention, call: dict) -> Tensor:
    """Returns what a layer returns, from its weights: a matrix of attention for each head, times the values."""
    asked = call.get("query", call.get("tokens"))
    told = call.get("key", asked)
    values = attention.project_apart(asked, told, told)[2]
    weights = torch.stack(list(compared(attention, call).weights()), 1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    return attention.merge(weights @ values)


@torch.no_grad()
@NAMES
@pytest.mark.parametrize("fields", [{}, {"positions": "rotary", "qk_norm": True, "biases": "all"}], ids=["", "rotary"])
@pytest.mark.parametrize("class_token", [True, False])
def test_attention_rebuilt_from_the_weights_is_what_each_layer_returned(name, fields, class_token):
    encoder = encoder_of(name, class_token, **fields)
    if class_token and not fields:
        encoder.leave_out_other_tokens()
    returned: dict[nn.Module, Tensor] = {}
    layers = [module for module in encoder.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, _, output: returned.update({layer: output}))
    with watching_attention(encoder) as calls:
        encoder(clips_of())
    assert set(calls) == set(layers)
    for layer, call in calls.items():
        torch.testing.assert_close(rebuilt(layer, call), returned[layer], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["boolean", "added", "segments"])
def test_attention_under_a_mask_is_rebuilt_from_the_weights(kind):
    torch.manual_seed(0)
    attention, tokens = Attention(24, 3), torch.randn(2, 5, 24)
    masks = {
        "boolean": causal_mask(5),
        "added": torch.randn(2, 3, 5, 5),
        "segments": block_diagonal(torch.tensor([[0, 0, 1, 1, -1], [0, 0, 0, 0, 0]])),
    }
    with watching_attention(attention) as calls:
        returned = attention(tokens, mask=masks[kind])
    torch.testing.assert_close(rebuilt(attention, calls[attention]), returned, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@NAMES
def test_shares_are_positive_and_sum_to_one_whatever_the_head_reads(name):
    for class_token, clips in itertools.product((True, False), (clips_of(1), clips_of(3))):
        encoder = encoder_of(name, class_token)
        last = encoder(clips).last().shape[:2]
        reads = [torch.ones(last) / last[1], torch.rand(last).softmax(1)]
        for read in [*reads, None] if class_token else reads:
            shares = rolled_out(encoder, clips, read)
            assert shares.tokens.shape == (len(clips), TOKENS)
            assert shares.tokens.min() > 0
            torch.testing.assert_close(shares.tokens.sum(1) + shares.class_tokens, torch.ones(len(clips)))


@torch.no_grad()
def test_the_row_of_a_joint_encoder_is_that_of_the_product_of_all_matrices():
    encoder, clips = encoder_of("joint"), clips_of()
    with watching_attention(encoder) as calls:
        encoder(clips)
    first, second = (compared(layer, call).mean() for layer, call in calls.items())
    identity = torch.eye(TOKENS + 1)
    product = (identity / 2 + second / 2) @ (identity / 2 + first / 2)
    torch.testing.assert_close(rollout(encoder, calls).tokens, product[:, 0, 1:])
    mean = rollout(encoder, calls, torch.full((2, TOKENS), 1 / TOKENS))
    torch.testing.assert_close(mean.tokens, product[:, 1:, 1:].mean(1))


@torch.no_grad()
def test_leaving_out_other_tokens_leaves_the_shares():
    encoder, clips = encoder_of("joint"), clips_of()
    every = rolled_out(encoder, clips)
    encoder.leave_out_other_tokens()
    torch.testing.assert_close(rolled_out(encoder, clips).tokens, every.tokens)


@torch.no_grad()
@NAMES
def test_watching_changes_no_bit_and_ends_with_its_context(name):
    encoder, clips = encoder_of(name), clips_of()
    plain = encoder(clips)
    with watching_attention(encoder) as calls:
        watched = encoder(clips)
    assert torch.equal(plain.tokens, watched.tokens)
    assert torch.equal(plain.class_token, watched.class_token)
    kept = dict(calls)
    encoder(clips_of(1))
    assert kept == calls
    assert not any(module._forward_pre_hooks for module in encoder.modules())


@torch.no_grad()
@NAMES
@pytest.mark.parametrize("reads", ["class_token", "mean"])
@pytest.mark.parametrize("token", [5, 38])
def test_the_one_tubelet_whose_key_attracts_has_the_heat(name, reads, token):
    encoder = attracting(encoder_of(name, positions="learned"))
    clips = torch.zeros(1, FRAMES, SIZE, SIZE, 3, dtype=torch.uint8)
    cut = torch.zeros(1, TOKENS, 1, dtype=torch.uint8)
    cut[:, token] = 255
    slot, row, column = token // 16, token % 16 // 4, token % 4
    clips[:, 2 * slot : 2 * slot + 2, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 255
    assert torch.equal(cut_tubelets(clips, (2, 8, 8)), cut.expand(-1, -1, 384))
    last = encoder(clips).last().shape[1]
    shares = rolled_out(encoder, clips, None if reads == "class_token" else torch.ones(1, last) / last)
    found = shares.tokens[0]
    others = torch.cat([found[:token], found[token + 1 :]])
    assert found[token] > 3 * others.max()
    if name == "joint":  # two blocks, each of which keeps a half and takes the other half from the one tubelet
        torch.testing.assert_close(found[token], torch.tensor(0.75), atol=0.01, rtol=0)
        torch.testing.assert_close(shares.class_tokens[0] + others.sum(), torch.tensor(0.25), atol=0.01, rtol=0)


@torch.no_grad()
def test_axial_attention_gives_nothing_off_the_axes_but_by_way_of_the_class_token():
    encoder = encoder_of("factorised_dot_product", class_token=False, depth=1)
    read = torch.zeros(1, TOKENS)
    read[0, 21] = 1  # slot 1, position 5
    shares = rolled_out(encoder, clips_of(1), read).tokens[0].view(3, 16)
    seen = torch.zeros(3, 16, dtype=torch.bool)
    seen[1], seen[:, 5] = True, True
    assert torch.equal(shares > 0, seen)
    assert shares[1, 5] > 0.5
    assert rolled_out(encoder_of("factorised_dot_product", depth=2), clips_of(1)).tokens.min() > 0


@torch.no_grad()
def test_a_message_brings_heat_from_other_slots():
    encoder, clips = encoder_of("cross_frame", depth=2), clips_of(1)
    read = torch.zeros(1, TOKENS)
    read[0, :16] = 1 / 16
    assert (rolled_out(encoder, clips, read).tokens[0] > 0).all()
    alone = encoder_of("cross_frame", depth=1)  # its messages are made of class tokens that have seen nothing yet
    assert torch.equal(rolled_out(alone, clips, read).tokens[0] > 0, torch.arange(TOKENS) < 16)


@torch.no_grad()
def test_a_packed_clip_has_the_shares_that_it_has_alone():
    encoder, clips = encoder_of("joint", class_token=False, positions="sincos_3d"), clips_of(1)
    read = torch.full((1, TOKENS), 1 / TOKENS)
    alone = rolled_out(encoder, clips, read).tokens
    coordinates = encoder.coordinates(clips, None)
    noise = torch.randint(0, 256, (1, 7, 384), dtype=torch.uint8)
    tokens = PackedTokens(
        torch.cat([cut_tubelets(clips, (2, 8, 8)), noise], 1),
        torch.cat([coordinates, torch.zeros(1, 7, 3, dtype=coordinates.dtype)], 1),
        torch.tensor([[0] * TOKENS + [-1] * 7]),
    )
    with watching_attention(encoder) as calls:
        encode_packed(encoder, tokens)
    packed = rollout(encoder, calls, torch.nn.functional.pad(read, (0, 7))).tokens
    torch.testing.assert_close(packed[:, :TOKENS], alone)
    assert not packed[:, TOKENS:].any()
