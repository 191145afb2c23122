"""Residual attention: its branches, the three kinds of mask, and a stem that looks into one tubelet at a time."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from pretrain.engine.optimizer import OptimizerConfig, build_optimizer
from pretrain.errors import Refused
from pretrain.model.encoder import Encoder, EncoderConfig
from pretrain.model.encoders import ENCODERS, build_encoder
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder
from pretrain.model.masking import MaskConfig, draw_mask
from pretrain.model.residual_attention import (
    SMALLEST_STEM_SIDE,
    ConvolutionalTubeletEmbedding,
    ResidualAttention,
    ResidualUnit,
)
from pretrain.model.tubelets import cut_tubelets
from tests.tokens import take_tokens

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TUBELET = (2, 8, 16)
KINDS = ("mixed", "channel", "spatial")


def feature_map(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def attention(kind: str = "mixed", **options: int) -> ResidualAttention:
    torch.manual_seed(1)
    return ResidualAttention(8, kind=kind, **options)


def clips_of(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 4, 16, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def stem(tubelet: tuple[int, int, int] = TUBELET) -> ConvolutionalTubeletEmbedding:
    torch.manual_seed(1)
    module = ConvolutionalTubeletEmbedding(tubelet, 10, MEAN, STD, channels=8)
    nn.init.normal_(module.projection.bias)
    return module


def last_convolution(module: ResidualAttention) -> nn.Conv3d:
    return module.mask.head[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(2, 8, 1, 8, 8), (3, 8, 2, 7, 5), (1, 8, 4, 14, 3)])
def test_maps_of_images_and_clips_of_any_size_keep_their_shape(kind, sizes):
    module, features = attention(kind), feature_map(*sizes)
    assert module(features).shape == module.attention(features).shape == features.shape


def test_the_output_is_the_trunk_times_one_plus_the_mask():
    module, features = attention(), feature_map(2, 8, 2, 8, 8)
    common = module.before(features)
    mask = module.attention(features)
    assert mask.std() > 0.01
    torch.testing.assert_close(module(features), module.trunk(common) + mask * module.trunk(common))


def test_where_the_mask_is_zero_the_trunk_passes_unchanged():
    module, features = attention(), feature_map(2, 8, 2, 8, 8)
    nn.init.zeros_(last_convolution(module).weight)
    nn.init.constant_(last_convolution(module).bias, -200)
    assert torch.equal(module(features), module.trunk(module.before(features)))


@pytest.mark.parametrize(("kind", "value"), [("mixed", 0.5), ("spatial", 0.5), ("channel", 0.0)])
def test_a_last_convolution_of_zeros_weighs_all_positions_alike(kind, value):
    """Its scores are 0: a sigmoid makes 1 / 2 of them, and a direction scaled to length 1 stays 0."""
    module, features = attention(kind), feature_map(2, 8, 2, 8, 8)
    nn.init.zeros_(last_convolution(module).weight)
    nn.init.zeros_(last_convolution(module).bias)
    assert torch.equal(module.attention(features), torch.full_like(features, value))
    torch.testing.assert_close(module(features), (1 + value) * module.trunk(module.before(features)))


def test_each_kind_of_attention_is_the_papers_function_of_the_scores():
    features = feature_map(2, 8, 2, 8, 8)
    scores = {}
    for kind in KINDS:
        module = attention(kind)
        last_convolution(module).register_forward_hook(lambda _, __, output: scores.update(last=output))
        mask = module.attention(features)
        last = scores["last"]
        if kind == "mixed":
            expected = 1 / (1 + torch.exp(-last))
        elif kind == "channel":
            expected = last / last.square().sum(1, keepdim=True).sqrt()
        else:
            mean, variance = last.mean((2, 3, 4), keepdim=True), last.var((2, 3, 4), keepdim=True, correction=0)
            expected = 1 / (1 + torch.exp(-(last - mean) / (variance + 1e-5).sqrt()))
        torch.testing.assert_close(mask, expected)


def test_branches_have_the_papers_numbers_of_units():
    module = attention(poolings=3, before=2, trunk=3, mask=2)
    assert (len(module.before), len(module.trunk)) == (2, 3)
    assert [len(units) for units in (*module.mask.down, *module.mask.up)] == [2] * 6
    assert len(module.mask.skips) == 2
    units = [part for part in module.modules() if isinstance(part, ResidualUnit)]
    assert len(units) == 2 + 3 + 12 + 2
    module(feature_map(1, 8, 1, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_mask_sees_farther_than_the_trunk():
    """A corner reaches the other end of the mask, through the coarsest scale, but not the other end of the trunk."""
    features = feature_map(1, 8, 1, 16, 16).requires_grad_()
    reach = {}
    module = attention(before=0)
    # Norms see the whole map; without them only convolutions and pooling carry anything.
    for part in module.modules():
        for name, child in part.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(part, name, nn.Identity())
    for name, branch in (("trunk", module.trunk), ("mask", module.mask)):
        (gradient,) = torch.autograd.grad(branch(features)[..., 0, 0].sum(), features)
        reach[name] = gradient.abs().sum((0, 1, 2)).nonzero().max().item()
    assert reach["trunk"] == 2
    assert reach["mask"] > 7


def test_a_samples_output_does_not_depend_on_the_batch():
    module, features = attention(), feature_map(3, 8, 2, 8, 8)
    torch.testing.assert_close(module(features)[1:2], module(features[1:2]))


@pytest.mark.parametrize("tubelet", [(1, 8, 8), (2, 8, 16), (4, 16, 16)])
def test_images_and_clips_become_one_token_a_tubelet(tubelet):
    clips = clips_of()[:, :1] if tubelet[0] == 1 else clips_of()  # a single frame is an image
    tokens = stem(tubelet)(clips)
    count = clips.shape[1] // tubelet[0] * (16 // tubelet[1]) * (32 // tubelet[2])
    assert tokens.shape == (2, count, 10)
    assert tokens.std((0, 1)).min() > 1e-3, "tokens differ by what their tubelets show"


def test_embedding_visible_tubelets_gives_the_rows_of_the_full_embedding():
    module, clips = stem(), clips_of()
    visible = torch.tensor([[0, 4, 6], [3, 5, 7]])
    expected = take_tokens(module(clips), visible)
    torch.testing.assert_close(module(clips, visible), expected)
    torch.testing.assert_close(module.embed(take_tokens(cut_tubelets(clips, TUBELET), visible)), expected)


def test_only_visible_tubelets_are_computed():
    module, sizes = stem(), []
    module.convolution.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape))
    module(clips_of(), torch.tensor([[0, 4, 6], [3, 5, 7]]))
    assert sizes == [(6, 3, *TUBELET)]


def test_a_token_has_no_gradient_from_any_pixel_of_another_tubelet():
    module = stem()
    clips = feature_map(1, 4, 16, 32, 3).requires_grad_()
    for module_output in (module(clips)[0, 5], module(clips, torch.tensor([[1, 5]]))[0, 1]):
        (gradient,) = torch.autograd.grad(module_output.sum(), clips)
        reached = cut_tubelets(gradient, TUBELET)[0].abs().amax(1) > 0
        assert reached.tolist() == [number == 5 for number in range(8)]


def test_masked_tubelets_that_are_not_finite_do_not_reach_visible_tokens():
    module, clips = stem(), feature_map(1, 4, 16, 32, 3)
    visible = torch.tensor([[0, 6]])
    poisoned = clips.clone()
    poisoned[:, 2:, :8] = float("nan")  # slot 1, row 0: tokens 4 and 5
    assert torch.equal(module(poisoned, visible), module(clips, visible))


def test_floats_are_taken_as_normalised_already():
    module, clips = stem(), clips_of()
    normalised = (clips.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(module(normalised), module(clips), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tokens_have_the_type_of_the_weights(dtype):
    assert stem().to(dtype)(clips_of()).dtype == dtype


@pytest.mark.parametrize("tubelet", [TUBELET, (1, 8, 8)])
def test_the_mask_of_a_clip_lies_over_its_own_pixels(tubelet):
    module, clips = stem(tubelet), clips_of()
    mask = module.attention_mask(clips)
    assert mask.shape == clips.shape[:-1]
    assert mask.min() > 0
    assert mask.max() < 1
    cut = cut_tubelets(mask.unsqueeze(-1), tubelet)  # (B, N, t * h * w)
    for number in (0, cut.shape[1] - 1):
        tubelets = cut_tubelets(clips, tubelet)[:, number]
        pixels = (tubelets.unflatten(-1, (*tubelet, 3)) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        own = module.attention.attention(module.convolution(pixels.permute(0, 4, 1, 2, 3))).mean(1, keepdim=True)
        own = functional.interpolate(own, tubelet, mode="trilinear", align_corners=False)
        torch.testing.assert_close(cut[:, number], own.flatten(1))


def test_the_smallest_side_leaves_one_position_on_the_coarsest_scale():
    sizes = []
    module = stem((1, SMALLEST_STEM_SIDE, SMALLEST_STEM_SIDE))
    module.attention.mask.down[-1].register_forward_hook(lambda _, __, output: sizes.append(output.shape[-2:]))
    module(clips_of()[:, :1])
    assert sizes == [(1, 1)]


def encoder_of(name: str, **fields: object) -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig(
        name=name, width=32, depth=2, heads=2, temporal_depth=1, tubelet=TUBELET, stem="residual_attention", **fields
    )
    return build_encoder(config, frames=4, size=32)


def square_clips() -> torch.Tensor:
    return clips_of().repeat(1, 1, 2, 1, 1)  # 32 x 32


@pytest.mark.parametrize("name", list(ENCODERS))
def test_every_encoder_learns_to_reconstruct_through_the_stem(name):
    model = MaskedAutoencoder(encoder_of(name), DecoderConfig(width=16, depth=1, heads=2))
    drawn = [draw_mask(MaskConfig("tube", 0.5), model.encoder.grid, key, key) for key in range(2)]
    visible, masked = (torch.stack([torch.from_numpy(part) for part in parts]) for parts in zip(*drawn, strict=True))
    reconstruction = model(square_clips(), visible, masked)
    assert reconstruction.prediction.shape == (*masked.shape, 2 * 8 * 16 * 3), "it predicts pixels, not features"
    reconstruction.loss.mean().backward()
    assert not [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]


def test_the_stem_is_the_layer_below_the_blocks_and_its_vectors_do_not_decay():
    encoder = encoder_of("joint")
    names = [key for key, _ in encoder.named_parameters() if key.startswith("embedding.")]
    assert {encoder.layer_of(key) for key in names} == {0}
    optimizer = build_optimizer(encoder, OptimizerConfig(weight_decay=0.1), global_batch=256)
    decay = {id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
    embedding = dict(encoder.embedding.named_parameters())
    decaying = {key for key, value in embedding.items() if decay[id(value)]}
    kernels = (nn.Conv3d, nn.Linear)
    expected = {f"{key}.weight" for key, part in encoder.embedding.named_modules() if isinstance(part, kernels)}
    assert decaying == expected


def test_the_stem_stays_cheap_beside_the_encoder():
    linear, stem = (
        build_encoder(EncoderConfig(stem=name, depth=1), 2, 32) for name in ("linear", "residual_attention")
    )
    clips, counted = torch.zeros(1, 2, 32, 32, 3), []
    for part in (linear.embedding, stem.embedding, linear.blocks):
        with FlopCounterMode(display=False) as counter:
            part(torch.zeros(1, 4, 768) if part is linear.blocks else clips)
        counted.append(counter.get_total_flops())
    assert counted[1] < 4 * counted[0]
    assert counted[1] / (12 * counted[2]) == pytest.approx(1 / 20, rel=0.05), "ViT-B has twelve blocks"


def test_a_tubelet_too_small_for_the_mask_branch_is_refused_with_both_fields():
    config = EncoderConfig(stem="residual_attention", tubelet=(2, 16, 4))
    with pytest.raises(Refused, match=r"^encoder\.stem: .* encoder\.tubelet is 2 x 16 x 4; .* at least 8"):
        config.validate(frames=4, size=32)
    dataclasses.replace(config, tubelet=(2, 8, 8)).validate(frames=4, size=32)
    dataclasses.replace(config, stem="linear").validate(frames=4, size=32)
