"""What the papers' equations imply, for every encoder: who can see whom, and when designs agree with each other."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask

from pretrain.model.attention import Attention, AxialAttention, block_diagonal, causal_mask
from pretrain.model.blocks import Block, BlockConfig, CrossBlock, stack
from pretrain.model.encoder import Encoder, EncoderConfig
from pretrain.model.encoders import ENCODERS, build_encoder
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder
from pretrain.model.tubelets import Grid

FRAMES, SIZE = 6, 16
GRID = Grid(3, 2, 2)
TINY = EncoderConfig(width=24, depth=2, heads=2, mlp_ratio=2.0, temporal_depth=2, tubelet=(2, 8, 8))
NAMES = pytest.mark.parametrize("name", list(ENCODERS))


@torch.no_grad()
def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its weights away from biases of zero and gains of one."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def encoder_of(name: str, **fields) -> Encoder:
    torch.manual_seed(0)
    return perturbed(build_encoder(dataclasses.replace(TINY, name=name, **fields), FRAMES, SIZE))


def clips_of(count: int = 1, frames: int = FRAMES) -> Tensor:
    return torch.randn(count, frames, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_with_one_slot_space_heads_are_model_1s_and_time_heads_return_their_own_values():
    torch.manual_seed(0)
    joint, axial = Attention(24, 4), AxialAttention(24, 4, space_heads=2)
    axial.load_state_dict(joint.state_dict())
    tokens = torch.randn(2, 5, 24)
    for layer in (joint, axial):
        layer.projection.weight.copy_(torch.eye(24))
        layer.projection.bias.zero_()
    values = joint.project(tokens)[2].transpose(1, 2).flatten(2)
    heads = axial(tokens, slots=1)
    torch.testing.assert_close(heads[..., :12], joint(tokens)[..., :12], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(heads[..., 12:], values[..., 12:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_axial_attention_is_attention_under_the_mask_of_its_axis():
    """Tokens of a slot, or of a position, and every token with the class token, both ways."""
    torch.manual_seed(0)
    joint = Attention(24, 2)
    tokens = torch.randn(2, 1 + GRID.tokens, 24)
    numbers = torch.arange(GRID.tokens)
    for space_heads, group in ((2, numbers // GRID.positions), (0, numbers % GRID.positions)):
        axial = AxialAttention(24, 2, space_heads)
        axial.load_state_dict(joint.state_dict())
        mask = torch.ones(1 + GRID.tokens, 1 + GRID.tokens, dtype=torch.bool)
        mask[1:, 1:] = group[:, None] == group[None]
        expected = joint(tokens, mask=mask)
        torch.testing.assert_close(axial(tokens, GRID.slots, class_tokens=1), expected, atol=1e-5, rtol=1e-5)
        without = joint(tokens[:, 1:], mask=mask[1:, 1:])
        torch.testing.assert_close(axial(tokens[:, 1:], GRID.slots), without, atol=1e-5, rtol=1e-5)


def static_clip(frames: int) -> Tensor:
    return clips_of(frames=1).expand(-1, frames, -1, -1, -1)


def centrally_inflated(name: str) -> tuple[Encoder, Encoder]:
    """An image model, and a video model of the design `name` with its weights.

    Its patch embedding is in the central frame of a tubelet, its positions are the same in every slot.
    """
    image = encoder_of("joint", tubelet=(1, 8, 8), positions="spatial")
    image = perturbed(build_encoder(image.config, 1, SIZE))
    video = encoder_of(name, positions="spatial")
    weights = image.state_dict()
    patch = weights.pop("embedding.projection.weight")
    inflated = torch.zeros(24, 2, patch.shape[1])
    inflated[:, 1] = patch
    own = video.state_dict()
    own["embedding.projection.weight"] = inflated.flatten(1)
    for key, weight in weights.items():
        if name == "factorised_self_attention":
            key = key.replace(".attention", ".space_attention").replace("space_attention_norm", "space_norm")
        assert own[key].shape == weight.shape
        own[key] = weight
    for key in own:
        if "time_attention.projection" in key:
            own[key] = torch.zeros_like(own[key])
    video.load_state_dict(own)
    return image, video


@torch.no_grad()
@pytest.mark.parametrize("name", ["joint", "factorised_encoder", "factorised_self_attention"])
def test_a_static_clip_through_a_centrally_inflated_model_gives_the_image_models_features(name):
    image, video = centrally_inflated(name)
    features = image(static_clip(1)).tokens
    tokens = video(static_clip(FRAMES)).tokens.unflatten(1, (GRID.slots, -1))
    for slot in range(GRID.slots):
        torch.testing.assert_close(tokens[:, slot], features, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@NAMES
def test_without_positions_in_time_permuted_slots_give_permuted_tokens(name):
    encoder, clips, order = encoder_of(name, positions="spatial"), clips_of(), torch.tensor([2, 0, 1])
    shuffled = clips.unflatten(1, (GRID.slots, -1))[:, order].flatten(1, 2)
    tokens = encoder(clips).tokens.unflatten(1, (GRID.slots, -1))
    permuted = encoder(shuffled).tokens.unflatten(1, (GRID.slots, -1))
    torch.testing.assert_close(permuted, tokens[:, order], atol=1e-5, rtol=1e-5)
    in_time = dataclasses.replace(encoder.config, positions="learned")
    encoder = perturbed(build_encoder(in_time, FRAMES, SIZE))
    tokens, permuted = encoder(clips), encoder(shuffled)
    if name == "factorised_encoder":
        assert not torch.allclose(permuted.temporal, tokens.temporal[:, order], atol=1e-3)
    assert not torch.allclose(permuted.tokens.unflatten(1, (3, -1)), tokens.tokens.unflatten(1, (3, -1))[:, order])


def influence(encoder: Encoder) -> Tensor:
    """The gradient of each slot's tokens on each slot's pixels: which of `(S, S)` is not zero."""
    clips = clips_of().requires_grad_()
    tokens = encoder(clips).tokens.unflatten(1, (GRID.slots, -1))
    rows = []
    for slot in range(GRID.slots):
        (gradient,) = torch.autograd.grad(tokens[:, slot].square().sum(), clips, retain_graph=True)
        rows.append(gradient.unflatten(1, (GRID.slots, -1)).abs().amax((0, 2, 3, 4, 5)) > 0)
    return torch.stack(rows)


def test_messages_carry_information_between_slots_and_nothing_does_without_them():
    encoder = encoder_of("cross_frame")
    assert influence(encoder).all()
    with torch.no_grad():
        for block in encoder.blocks:
            block.message.weight.zero_()
    assert torch.equal(influence(encoder), torch.eye(3, dtype=torch.bool))


@NAMES
def test_tokens_see_other_slots_in_every_design_but_the_spatial_part_of_model_2(name):
    seen = influence(encoder_of(name))
    alone = torch.eye(3, dtype=torch.bool)
    assert torch.equal(seen, alone if name == "factorised_encoder" else torch.ones_like(alone))


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "cross_frame"])  # class tokens stand nowhere
@pytest.mark.parametrize("positions", ["rotary", "sincos"])
def test_rotary_positions_depend_on_distances_only(name, positions):
    """Visible tokens moved by a row and a slot give the same tokens under rotary positions, and others under others."""
    config = dataclasses.replace(TINY, name=name, positions=positions)
    encoder = perturbed(build_encoder(config, 8, 32))
    grid = encoder.grid  # 4 x 4 x 4
    visible = torch.tensor([[0, 2, 5, 16, 18, 21]])
    clips = torch.randn(1, 8, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    moved = torch.zeros_like(clips)
    moved[:, 2:, 8:] = clips[:, :-2, :-8]
    with torch.no_grad():
        tokens = encoder(clips, visible, 2).tokens
        elsewhere = encoder(moved, visible + grid.positions + grid.columns, 2).tokens
    assert torch.allclose(tokens, elsewhere, atol=1e-4) == (positions == "rotary")


@pytest.mark.parametrize("as_scores", [False, True], ids=["boolean", "additive"])
def test_a_causal_mask_leaks_nothing_from_the_future(as_scores):
    torch.manual_seed(0)
    block = perturbed(Block(BlockConfig(24, 2)))
    mask = causal_mask(5)
    if as_scores:
        mask = torch.zeros(5, 5).masked_fill(~mask, -torch.inf)
    tokens = torch.randn(1, 5, 24, requires_grad=True)
    out = block(tokens, mask)
    for last in range(5):
        (gradient,) = torch.autograd.grad(out[0, last].square().sum(), tokens, retain_graph=True)
        reached = gradient[0].abs().amax(1) > 0
        assert reached.tolist() == [place <= last for place in range(5)]


@torch.no_grad()
def test_block_diagonal_attention_is_each_segment_alone():
    torch.manual_seed(0)
    attention, tokens = perturbed(Attention(24, 2)), torch.randn(1, 7, 24)
    segments = torch.tensor([[0, 1, 0, 1, 1, 2, 0]])
    together = attention(tokens, mask=block_diagonal(segments))
    for segment in range(3):
        own = segments[0] == segment
        torch.testing.assert_close(together[:, own], attention(tokens[:, own]), atol=1e-5, rtol=1e-5)


def test_packed_masks_are_flex_attentions_only_where_it_is_compiled_for_a_gpu(monkeypatch):
    """Without compilation flex attention would store the scores of all heads; fake tensors need no GPU."""
    with FakeTensorMode():
        segments = torch.zeros(2, 256, dtype=torch.int64, device="cuda")
        plain = block_diagonal(segments)
        assert isinstance(plain, torch.Tensor)
        assert plain.shape == (2, 1, 256, 256)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert isinstance(block_diagonal(segments), BlockMask)
        assert isinstance(block_diagonal(segments.cpu()), torch.Tensor)


def test_normalised_queries_and_keys_have_the_precision_of_values():
    """Autocast for a GPU normalises in full precision, and flex attention takes queries, keys and values of one."""
    attention = Attention(24, 2, qk_norm=True)
    for norm in (attention.query_norm, attention.key_norm):
        norm.register_forward_hook(lambda *called: called[-1].float())
    tokens = torch.randn(1, 3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        for parts in (attention.project(tokens), attention.project_apart(tokens, tokens, tokens)):
            assert {part.dtype for part in parts} == {torch.bfloat16}


@torch.no_grad()
def test_cross_attention_is_self_attention_over_both_without_the_queries_own_keys():
    torch.manual_seed(0)
    attention, queries, context = perturbed(Attention(24, 2, "all")), torch.randn(2, 3, 24), torch.randn(2, 4, 24)
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[:, :3] = torch.eye(7, 3, dtype=torch.bool) & (torch.arange(7) >= 3).unsqueeze(1)
    expected = attention(torch.cat([queries, context], 1), mask=mask)[:, :3]
    torch.testing.assert_close(attention(queries, context, context), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention(queries, context), expected, atol=1e-5, rtol=1e-5)


class Doubled(torch.nn.Module):
    """Stands around a projection, as an adapter does."""

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.weight = base_layer.weight

    def forward(self, *given: Tensor) -> Tensor:
        return 2 * self.base_layer(*given)


@torch.no_grad()
@pytest.mark.parametrize("biases", ["query_value", "all"])
def test_what_wraps_a_projection_is_asked_by_self_attention_cross_attention_and_attention_along_axes(biases):
    torch.manual_seed(0)
    tokens, keys, values = torch.randn(3, 2, 6, 24).unbind()
    for layer, inputs in (
        (Attention(24, 2, biases), (tokens,)),
        (Attention(24, 2, biases), (tokens[:, :1], tokens)),
        (Attention(24, 2, biases), (tokens, keys, values)),
        (AxialAttention(24, 2, 1, biases), (tokens, 3)),
    ):
        perturbed(layer)
        doubled = copy.deepcopy(layer)
        for name, parameter in doubled.named_parameters():
            if name.startswith(("qkv.", "query_bias", "key_bias", "value_bias")):
                parameter.mul_(2)
        plain = layer(*inputs)
        layer.qkv = Doubled(layer.qkv)
        torch.testing.assert_close(layer(*inputs), doubled(*inputs), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(layer(*inputs), plain, atol=1e-2)


@pytest.mark.parametrize("recomputes", [False, True])
def test_tokens_that_nobody_wants_are_not_computed_and_the_others_stay_the_same(recomputes):
    blocks = perturbed(stack(Block, BlockConfig(24, 2, 2.0), depth=3))
    blocks.recomputes = recomputes
    tokens, lengths = torch.randn(2, 7, 24, requires_grad=True), []
    blocks[-1].mlp.register_forward_hook(lambda mlp, inputs, output: lengths.append(output.shape[1]))
    for wanted in (3, 7):
        last, whole = blocks(tokens, wanted=slice(-wanted, None)), blocks(tokens)[:, -wanted:]
        assert lengths[-2:] == [wanted, 7]
        torch.testing.assert_close(last, whole, atol=1e-5, rtol=1e-5)
        (gradient,), (expected,) = (torch.autograd.grad(out.square().sum(), tokens) for out in (last, whole))
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


def test_a_decoder_that_looks_across_predicts_each_token_as_if_it_were_alone():
    """So any part of the masked tokens can be reconstructed (CrossMAE); a joint decoder's tokens see each other."""
    visible, masked = torch.tensor([[0, 3, 4, 7, 8, 11]]), torch.tensor([[1, 2, 5, 6, 9, 10]])
    clips = torch.randint(0, 256, (1, FRAMES, SIZE, SIZE, 3), dtype=torch.uint8)
    for attention in ("cross", "joint"):
        config = DecoderConfig(24, 2, 2, 2.0, attention=attention)
        model = perturbed(MaskedAutoencoder(encoder_of("joint"), config))
        assert isinstance(model.decoder_blocks[0], CrossBlock if attention == "cross" else Block)
        with torch.no_grad():
            together = model(clips, visible, masked).prediction[:, :2]
            alone = model(clips, visible, masked[:, :2]).prediction
        assert torch.allclose(together, alone, atol=1e-5) == (attention == "cross")


@pytest.mark.parametrize("attention", ["joint", "cross"])
def test_the_temporal_transformer_of_model_2_learns_under_mae(attention):
    config = DecoderConfig(24, 2, 2, 2.0, attention=attention)
    model = perturbed(MaskedAutoencoder(encoder_of("factorised_encoder"), config))
    clips = torch.randint(0, 256, (1, FRAMES, SIZE, SIZE, 3), dtype=torch.uint8)
    visible, masked = torch.tensor([[0, 3, 4, 7, 8, 11]]), torch.tensor([[1, 2, 5, 6, 9, 10]])
    model(clips, visible, masked).loss.mean().backward()
    for name, parameter in model.encoder.named_parameters():
        if name.startswith("temporal"):
            assert parameter.grad.abs().max() > 1e-8, name
