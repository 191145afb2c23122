"""Encoders: visible tokens against all tokens, the factorised encoder slot by slot, sizes, layers, class tokens."""

import dataclasses

import pytest
import torch
from torch import Tensor

from pretrain.errors import Refused
from pretrain.model.blocks import CrossFrameBlock
from pretrain.model.encoder import VARIANTS, Encoder, EncoderConfig
from pretrain.model.encoders import ENCODERS, build_encoder
from pretrain.model.masking import MaskConfig, draw_mask
from pretrain.model.positions import POSITIONS, sincos_table

TINY = EncoderConfig(width=48, depth=2, heads=2, temporal_depth=2, tubelet=(2, 8, 8))
FRAMES, SIZE, TOKENS = 6, 32, 48
NAMES = pytest.mark.parametrize("name", list(ENCODERS))


def encoder_of(name: str, class_token: bool = False, **fields) -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(dataclasses.replace(TINY, name=name, **fields), FRAMES, SIZE, class_token=class_token)
    with torch.no_grad():
        for parameter in encoder.parameters():  # away from biases of zero, which would hide their place
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder.eval()


def clips_of(count: int = 2) -> Tensor:
    shape = (count, FRAMES, SIZE, SIZE, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def tube(count: int = 2, ratio: float = 0.75) -> Tensor:
    grid = encoder_of("joint").grid
    return torch.stack(
        [torch.from_numpy(draw_mask(MaskConfig("tube", ratio), grid, key, 0)[0]) for key in range(count)]
    )


@NAMES
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("class_token", [False, True])
def test_listing_every_token_is_the_same_as_listing_none(name, positions, class_token):
    encoder, clips = encoder_of(name, class_token, positions=positions), clips_of()
    listed, plain = encoder(clips, torch.arange(TOKENS).expand(2, -1)), encoder(clips)
    assert plain.tokens.shape == (2, TOKENS, 48)
    for one, other in zip(listed, plain, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@NAMES
def test_hidden_pixels_do_not_reach_the_encoder(name):
    encoder, clips, visible = encoder_of(name), clips_of(), tube()
    hidden = sorted(set(range(TOKENS)) - set(visible[0].tolist()))[0]
    row, column = divmod(hidden % 16, 4)
    changed = clips.clone()
    changed[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0
    assert torch.equal(encoder(changed, visible).tokens, encoder(clips, visible).tokens)
    assert not torch.equal(encoder(changed).tokens, encoder(clips).tokens)


@NAMES
def test_a_clip_does_not_depend_on_the_others_in_its_batch(name):
    encoder, clips, visible = encoder_of(name, class_token=True), clips_of(3), tube(3)
    alone = encoder(clips[1:2], visible[1:2])
    together = encoder(clips, visible)
    torch.testing.assert_close(alone.tokens[0], together.tokens[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone.class_token[0], together.class_token[1], atol=1e-5, rtol=1e-5)


def test_the_joint_encoder_is_its_blocks_over_all_tokens_at_once():
    encoder, clips, visible = encoder_of("joint", class_token=True), clips_of(), tube()
    tokens = encoder.embedding(clips)[torch.arange(2).unsqueeze(1), visible] + sincos_table(TOKENS, 48)[visible]
    tokens = torch.cat([encoder.class_token.expand(2, -1, -1), tokens], 1)
    for block in encoder.blocks:
        tokens = block(tokens)
    tokens = encoder.norm(tokens)
    encoded = encoder(clips, visible)
    torch.testing.assert_close(encoded.class_token, tokens[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoded.tokens, tokens[:, 1:], atol=1e-5, rtol=1e-5)
    assert (encoded.temporal, encoded.slots) == (None, None)


def visible_in_two_slots() -> Tensor:
    """Three tokens in each of two of the three slots, other slots in each clip."""
    return torch.tensor([[0, 5, 9, 32, 40, 47], [16, 17, 30, 33, 34, 35]])


@pytest.mark.parametrize(
    ("visible", "visible_slots"),
    [(None, None), (tube(), None), (visible_in_two_slots(), 2)],
    ids=["all", "tube", "two-slots"],
)
def test_the_factorised_encoder_is_each_slot_alone_and_then_their_means(visible, visible_slots):
    encoder, clips = encoder_of("factorised_encoder", class_token=True), clips_of()
    encoded = encoder(clips, visible, visible_slots)
    numbers = torch.arange(TOKENS).expand(2, -1) if visible is None else visible
    embedded = encoder.embedding(clips) + sincos_table(TOKENS, 48)
    for b in range(2):
        slots = numbers[b].div(16, rounding_mode="floor").unique()
        assert encoded.slots[b].tolist() == slots.tolist()
        spatial = []
        for slot in slots:
            tokens = embedded[b : b + 1, numbers[b][numbers[b] // 16 == slot]]
            for block in encoder.blocks:
                tokens = block(tokens)
            spatial.append(encoder.norm(tokens)[0])
        torch.testing.assert_close(encoded.tokens[b], torch.cat(spatial), atol=1e-5, rtol=1e-5)
        temporal = torch.stack([tokens.mean(0) for tokens in spatial]) + sincos_table(3, 48)[slots]
        temporal = torch.cat([encoder.class_token[0], temporal]).unsqueeze(0)
        for block in encoder.temporal_blocks:
            temporal = block(temporal)
        temporal = encoder.temporal_norm(temporal)[0]
        torch.testing.assert_close(encoded.class_token[b], temporal[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(encoded.temporal[b], temporal[1:], atol=1e-5, rtol=1e-5)


@NAMES
def test_the_mean_is_over_what_the_last_transformer_returns(name):
    encoded = encoder_of(name)(clips_of())
    last = encoded.temporal if name == "factorised_encoder" else encoded.tokens
    assert torch.equal(encoded.mean(), last.mean(1))
    assert encoded.mean().shape == (2, 48)


@NAMES
def test_a_class_token_is_there_only_when_asked_for_or_when_the_design_has_it(name):
    plain, classed = encoder_of(name), encoder_of(name, class_token=True)
    always = name == "cross_frame"
    assert (plain(clips_of()).class_token is not None) == always
    assert classed.state_dict().keys() - plain.state_dict().keys() == (set() if always else {"class_token"})
    encoded = classed(clips_of())
    assert encoded.class_token.shape == (2, 48)
    assert encoded.tokens.shape == (2, TOKENS, 48)
    encoded.class_token.square().sum().backward()
    without_gradient = {name for name, parameter in classed.named_parameters() if parameter.grad is None}
    assert not without_gradient


# Published: ViT (table 1) 86, 307 and 632 M; VideoMAE 22, 87, 305 and 633 M with head; DeiT-Ti 5.7 M.
@pytest.mark.parametrize(("variant", "millions"), [("Ti", 5.6), ("S", 21.9), ("B", 86.2), ("L", 303.9), ("H", 631.6)])
def test_variants_have_their_published_size(variant, millions):
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(variant=variant), frames=16, size=224)
    assert len(encoder.blocks) == VARIANTS[variant][1]
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@NAMES
@pytest.mark.parametrize("positions", POSITIONS)
def test_every_parameter_has_its_layer_and_every_layer_its_parameters(name, positions):
    encoder = encoder_of(name, class_token=True, positions=positions)
    layers = {parameter: encoder.layer_of(parameter) for parameter, _ in encoder.named_parameters()}
    assert set(layers.values()) == set(range(encoder.layers + 2))
    for parameter, layer in layers.items():
        stack, _, rest = parameter.partition(".")
        if stack in ("embedding", "positions"):
            assert layer == 0, parameter
        elif stack == "blocks":
            assert layer == int(rest.split(".")[0]) + 1, parameter
        elif stack == "temporal_blocks":
            assert layer == 2 + int(rest.split(".")[0]) + 1, parameter
        elif stack == ("temporal_norm" if name == "factorised_encoder" else "norm"):
            assert layer == encoder.layers + 1, parameter
        elif stack in ("norm", "temporal_positions"):
            assert layer == 2, "the last spatial block's"
        elif name == "cross_frame":
            assert (stack, layer) == ("class_token", 0), "pretrained like the embedding"
        else:
            assert (stack, layer) == ("class_token", encoder.layers + 1), "as new as the head"


def test_a_class_token_that_came_with_the_weights_learns_as_fast_as_what_it_joins():
    for name, layer in (("joint", 0), ("factorised_self_attention", 0), ("factorised_encoder", 2), ("cross_frame", 0)):
        encoder = encoder_of(name, class_token=True)
        encoder.has_class_tokens = True
        assert encoder.layer_of("class_token") == layer, name


def test_a_clip_skips_the_branches_of_cross_frame_attention_in_all_its_slots_or_in_none():
    torch.manual_seed(0)
    block = CrossFrameBlock(TINY.block(), drop_path=0.5)
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    tokens = torch.randn(16, 4, 3, 48)
    changed = (block(tokens) != tokens).flatten(2).any(-1)  # (B, S)
    assert torch.equal(changed.any(1), changed.all(1))
    assert changed.any()
    assert not changed.all()


def test_drop_path_rises_over_both_transformers_and_acts_only_in_training():
    encoder = encoder_of("factorised_encoder", drop_path=0.3)
    rates = [block.drop_path.drop_prob for block in [*encoder.blocks, *encoder.temporal_blocks]]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    clips = clips_of()
    assert torch.equal(encoder(clips).temporal, encoder(clips).temporal)
    encoder.train()
    assert len({encoder(clips).temporal.sum().item() for _ in range(8)}) > 1


def test_a_width_depth_or_heads_given_replaces_the_variants():
    resolved = EncoderConfig(variant="S", width=384, depth=12, heads=6, mlp_ratio=4.0)
    assert EncoderConfig(variant="S").resolved() == resolved
    full = EncoderConfig(variant="S", width=96, heads=3).resolved()
    assert (full.width, full.depth, full.heads) == (96, 12, 3)
    assert EncoderConfig(depth=0).resolved().depth == 0, "a value that cannot be is refused, never replaced"


@pytest.mark.parametrize(
    ("fields", "frames", "size", "message"),
    [
        ({}, 15, 224, r"data\.clip\.frames: 15 frames do not divide into tubelets of 2"),
        ({}, 16, 220, r"data\.clip\.size: 220 pixels do not divide into tubelets of 16 x 16"),
        ({"tubelet": (2, 16, 15)}, 16, 224, r"data\.clip\.size: 224 pixels"),
        ({"tubelet": (0, 16, 16)}, 16, 224, r"encoder\.tubelet: 0 x 16 x 16"),
        ({"heads": 5}, 16, 224, r"encoder\.heads: 5 heads do not divide encoder\.width 768"),
        ({"width": 15, "heads": 3}, 16, 224, r"encoder\.width: 15 must be even"),
        ({"drop_path": 1.0}, 16, 224, r"encoder\.drop_path: 1\.0"),
        ({"variant": "Ti", "name": "factorised_dot_product"}, 16, 224, r"encoder\.heads: 3 is odd, but encoder\.name"),
        ({"layer_scale": 0.0}, 16, 224, r"encoder\.layer_scale: 0\.0"),
        ({"norm_eps": 0.0}, 16, 224, r"encoder\.norm_eps: 0\.0"),
        ({"width": 16, "heads": 4, "positions": "rotary"}, 16, 224, r"encoder\.positions: rotary .* heads of 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_their_field(fields, frames, size, message):
    EncoderConfig().validate(16, 224)
    with pytest.raises(Refused, match=message):
        EncoderConfig(**fields).validate(frames, size)


@pytest.mark.parametrize(
    ("field", "value"),
    [("width", -768), ("depth", 0), ("depth", -1), ("heads", 0), ("temporal_depth", -1), ("mlp_ratio", 0.0)],
)
def test_a_size_below_one_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(Refused, match=rf"^encoder\.{field}: {value} must be at least 1"):
        EncoderConfig(**{field: value}).validate(16, 224)
    with pytest.raises(Refused, match=rf"^architecture\.{field}: "):
        EncoderConfig(**{field: value}).validate(16, 224, field="architecture")


@pytest.mark.parametrize(
    "fields", [{"position_temperature": 1.0}, {"positions": "learned", "position_temperature": 20.0}]
)
def test_a_temperature_that_cannot_be_or_has_no_effect_is_refused(fields):
    with pytest.raises(Refused, match=r"^encoder\.position_temperature: "):
        EncoderConfig(**fields).validate(16, 224)


@NAMES
def test_without_its_last_norm_an_encoder_returns_what_the_last_block_returns(name):
    encoder, clips = encoder_of(name), clips_of()
    norm = encoder.temporal_norm if name == "factorised_encoder" else encoder.norm
    normed = encoder(clips).mean()
    encoder.leave_out_last_norm()
    last = encoder(clips)
    tokens = last.temporal if name == "factorised_encoder" else last.tokens
    torch.testing.assert_close(norm(tokens).mean(1), normed)
    assert not torch.allclose(last.mean(), normed, atol=0.1)


def test_a_head_that_reads_the_class_token_alone_gets_the_same_one():
    encoder, clips = encoder_of("joint", class_token=True), clips_of()
    expected = encoder(clips).class_token
    encoder.leave_out_other_tokens()
    encoded = encoder(clips)
    torch.testing.assert_close(encoded.class_token, expected, atol=1e-6, rtol=1e-5)
    assert encoded.tokens.shape[1] == 0, "the last block computed them all the same"
