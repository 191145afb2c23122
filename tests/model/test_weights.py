"""Converted weights: nothing is left over or missing, images become clips, and positions fit other grids."""

import dataclasses

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pretrain.errors import Refused
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import build_encoder
from pretrain.model.tubelets import Grid
from pretrain.model.weights.inflation import inflated, resized, with_positions_for
from pretrain.model.weights.layouts import convert
from pretrain.model.weights.parts import ConvertedModel, colours
from pretrain.model.weights.source import Source
from pretrain.model.weights.videomae_out import to_videomae


def vit(**options) -> dict[str, Tensor]:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
    return VisionTransformer(**sizes, num_classes=0, **options).state_dict()


def image_model(**options) -> ConvertedModel:
    return convert(Source(vit(**options), heads=3))


def features(model: ConvertedModel, clips: Tensor) -> Tensor:
    has_token = "class_token" in model.weights
    encoder = build_encoder(model.encoder, model.frames, model.size, model.mean, model.std, has_token)
    encoder.load_state_dict(model.weights)
    with torch.no_grad():
        return encoder.eval()(clips).tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reg_token": torch.zeros(1, 4, 48)}, "vit.pth: nothing uses reg_token (1 such weights)"),
        ({"blocks.1.norm2.bias": None}, "vit.pth: lacks blocks.1.norm2.bias"),
        ({"blocks.1.mlp.fc1.weight": torch.zeros(64, 48)}, "vit.pth: blocks.1.mlp.fc1.weight would be (64, 48)"),
        ({"blocks.0.attn.qkv.bias": None}, "vit.pth: blocks.1.attention.key_bias has no place here"),
        ({"blocks.1.attn.qkv.bias": None}, "vit.pth: fills nothing of blocks.1.attention.key_bias"),
        ({"pos_embed": torch.zeros(1, 20, 48)}, "vit.pth: pos_embed has 20 positions, which form no square"),
        ({"patch_embed.proj.weight": None}, "vit.pth: is of no layout that Tubelet knows"),
        ({"blocks.0.mlp.fc1.bias": torch.tensor(1.0)}, "vit.pth: its weights or its config.json are not as its layout"),
        (
            {"cls_token": torch.zeros(1, 1, 47)},
            "vit.pth: its weights or its config.json are not as its layout has them",
        ),
        ({name: None for name in vit() if name.startswith("blocks.")}, "vit.pth: lacks blocks.0; it is incomplete"),
    ],
)
def test_a_key_that_is_not_used_or_not_filled_is_refused_by_its_name(change, message):
    weights = {name: value for name, value in (vit() | change).items() if value is not None}
    with pytest.raises(Refused) as error:
        convert(Source(weights, heads=3, name="vit.pth"))
    assert message in str(error.value)


def test_heads_come_from_what_tells_them_else_from_published_sizes_else_from_a_width_of_64():
    with pytest.raises(Refused, match=r"heads: those of weights, whose tokens are 48 wide, cannot be told"):
        convert(Source(vit()))
    with pytest.raises(Refused, match=r"heads: is 4, but weights has 3"):
        convert(Source(vit(), {"num_attention_heads": 3}, heads=4))
    assert convert(Source(vit(), {"num_attention_heads": 3})).encoder.heads == 3
    with torch.device("meta"):
        huge = VisionTransformer(patch_size=14, embed_dim=1280, depth=32, num_heads=16, weight_init="skip").state_dict()
        wide = VisionTransformer(embed_dim=256, depth=2, num_heads=4, weight_init="skip").state_dict()
    assert convert(Source(huge)).encoder.sizes() == EncoderConfig(variant="H").sizes(), "whose heads are 80 wide"
    assert convert(Source(wide)).encoder.heads == 4


@pytest.mark.parametrize("inflation", ["central", "average"])
@pytest.mark.parametrize("t", [1, 2, 3])
def test_a_clip_that_stands_still_has_the_features_of_its_image_in_every_slot(inflation, t):
    image = image_model(class_token=False, global_pool="avg", fc_norm=False)
    still = torch.randint(0, 256, (2, 1, 32, 32, 3), dtype=torch.uint8)
    clip = inflated(image, 6, (t, 8, 8), inflation)
    found = features(clip, still.expand(-1, 6, -1, -1, -1)).unflatten(1, (6 // t, -1))
    torch.testing.assert_close(found, features(image, still).unsqueeze(1).expand_as(found), atol=1e-5, rtol=1e-5)


def test_inflation_looks_at_the_central_frame_or_at_the_mean_of_the_frames():
    image, generator = image_model(), torch.Generator().manual_seed(1)
    for t, inflation in ((2, "central"), (3, "central"), (3, "average")):
        clip = inflated(image, t, (t, 8, 8), inflation)
        frames = torch.rand(2, t, 32, 32, 3, generator=generator)
        seen = frames[:, t // 2 : t // 2 + 1] if inflation == "central" else frames.mean(1, keepdim=True)
        torch.testing.assert_close(features(clip, frames), features(image, seen), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("frames", "tubelet", "message"),
    [
        (4, (2, 16, 16), "tubelet: is 2 x 16 x 16, but the image model has patches of 8 x 8"),
        (5, (2, 8, 8), "frames: 5 frames do not divide into tubelets of 2"),
    ],
)
def test_inflation_that_cannot_be_is_refused_with_both_names(frames, tubelet, message):
    with pytest.raises(Refused, match=message):
        inflated(image_model(), frames, tubelet, "central")


def test_positions_are_interpolated_to_other_frames_and_sizes_and_left_alone_at_the_same():
    clip = inflated(image_model(), 4, (2, 8, 8), "central")
    same = resized(clip, 4, (32, 32))
    assert torch.equal(same.weights["positions.table"], clip.weights["positions.table"])
    longer = resized(clip, 8, (64, 48))
    assert longer.grid == Grid(4, 8, 6)
    table = longer.weights["positions.table"].unflatten(1, longer.grid)
    torch.testing.assert_close(table, table[:, :1].expand_as(table), msg="equal in every slot, as they were")
    features(longer, torch.zeros(1, 8, 64, 48, 3, dtype=torch.uint8))
    with pytest.raises(Refused, match=r"size: 36 x 36 pixels do not divide into patches of 8 x 8"):
        resized(clip, 4, (36, 36))
    with pytest.raises(Refused, match=r"frames: 3 frames do not divide into tubelets of 2"):
        resized(clip, 3, (32, 32))


@pytest.mark.parametrize("positions", ["learned", "separable", "factorised", "spatial", "sincos", "rotary"])
def test_an_encoder_of_every_kind_of_positions_takes_the_weights_of_another_grid(positions):
    config = EncoderConfig(
        name="factorised_encoder", width=48, depth=1, heads=2, temporal_depth=1, tubelet=(2, 8, 8), positions=positions
    )
    old, new = build_encoder(config, 4, 16), build_encoder(config, 8, 32)
    weights = with_positions_for(old.state_dict(), old.grid, new.grid)
    new.load_state_dict(weights)
    assert all(torch.equal(weights[name], value) for name, value in old.state_dict().items() if "positions" not in name)


def test_colours_are_those_that_transformers_processor_makes():
    assert colours(Source({})) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    plain = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 255}
    assert colours(Source({}, processor=plain)) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    vivit = plain | {"rescale_factor": 1 / 127.5, "offset": True}
    mean, std = (torch.tensor(part) for part in colours(Source({}, processor=vivit)))
    pixels = torch.rand(5, 3) * 255
    expected = (pixels / 127.5 - 1 - torch.tensor(plain["image_mean"])) / torch.tensor(plain["image_std"])
    torch.testing.assert_close((pixels / 255 - mean) / std, expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "factorised_encoder"),
        ("positions", "learned"),
        ("biases", "all"),
        ("layer_scale", 0.1),
        ("stem", "residual_attention"),
    ],
)
def test_what_videomae_has_no_place_for_is_refused_by_its_field(field, value):
    config = dataclasses.replace(EncoderConfig(width=48, depth=1, heads=3), **{field: value})
    encoder = build_encoder(config, 16, 224)
    model = ConvertedModel("Tubelet", config, 16, (224, 224), (0.5,) * 3, (0.5,) * 3, encoder.state_dict())
    with pytest.raises(Refused, match=rf"encoder\.{field}: is {value}, but Hugging Face's VideoMAE has"):
        to_videomae(model)
