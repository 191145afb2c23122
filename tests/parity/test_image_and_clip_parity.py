"""ViViT, X-CLIP, CLIP's block and timm's ViT against ours: outputs and every gradient, on the same weights."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from transformers import (
    CLIPTextConfig,
    VivitConfig,
    VivitForVideoClassification,
    VivitModel,
    XCLIPConfig,
    XCLIPModel,
    XCLIPVisionConfig,
)
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.x_clip.modeling_x_clip import XCLIPVisionEncoderLayer, XCLIPVisionModel

from pretrain.model.attention import causal_mask
from pretrain.model.blocks import Block, BlockConfig, CrossFrameBlock
from pretrain.model.weights.layouts import convert
from pretrain.model.weights.source import Source
from pretrain.model.weights.xclip import clip_block, xclip_block
from tests.parity.references import (
    CLASSES,
    FRAMES,
    PATCH,
    SIZE,
    SIZES,
    assert_same,
    assert_same_gradients,
    clips_of,
    converted,
    perturbed,
    pixel_values,
    probe,
    run_classifier,
    run_encoder,
    run_with,
)


def vivit_config(**options) -> VivitConfig:
    return VivitConfig(**SIZES, tubelet_size=[2, PATCH, PATCH], num_labels=CLASSES, **options)


def xclip_config(**options) -> XCLIPVisionConfig:
    return XCLIPVisionConfig(**SIZES, patch_size=PATCH, **options)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "hidden_act": "gelu"}])
def test_a_class_token_gives_vivits_logits_and_gradients(options):
    theirs = perturbed(VivitForVideoClassification(vivit_config(**options)))
    ours, clips = converted(theirs), clips_of(FRAMES)
    expected, logits = theirs(pixel_values(clips, ours)).logits, run_classifier(ours, clips)
    assert_same(logits, expected)
    assert_same_gradients(probe(logits), probe(expected), theirs)


def test_vivit_without_a_head_gives_its_tokens_and_leaves_out_the_pooler():
    theirs = perturbed(VivitModel(vivit_config()))
    ours, clips = converted(theirs), clips_of(FRAMES)
    assert ours.left_out == ("pooler",)
    expected, encoded = theirs(pixel_values(clips, ours)).last_hidden_state, run_encoder(ours, clips)
    assert_same(encoded.tokens, expected[:, 1:])
    assert_same(encoded.class_token, expected[:, 0])


def test_vivits_keys_of_old_releases_and_of_published_files_convert_alike():
    theirs = perturbed(VivitForVideoClassification(vivit_config()))
    old = {}
    for name, value in theirs.state_dict().items():
        for new_part, old_part in {
            ".layers.": ".encoder.layer.",
            "attention.o_proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
            "q_proj": "attention.query",
            "k_proj": "attention.key",
            "v_proj": "attention.value",
        }.items():
            name = name.replace(new_part, old_part)
        old[name] = value
    assert "vivit.encoder.layer.1.attention.attention.key.bias" in old
    found, expected = convert(Source(old, theirs.config.to_dict())), converted(theirs)
    assert found.encoder == expected.encoder
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())


def test_the_vision_part_of_xclip_is_its_vision_model():
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision = xclip_config(mit_hidden_size=32, mit_intermediate_size=64, mit_num_attention_heads=2).to_dict()
    theirs = perturbed(XCLIPModel(XCLIPConfig(text_config=text, vision_config=vision, projection_dim=32)))
    found, expected = converted(theirs), converted(theirs.vision_model)
    assert found.encoder == expected.encoder
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())
    assert {"text_model", "mit", "logit_scale"} <= set(found.left_out)


def test_the_cross_frame_block_is_xclips():
    config = xclip_config()
    theirs = perturbed(XCLIPVisionEncoderLayer(config))
    ours = CrossFrameBlock(BlockConfig(48, 3, 2.0, "quick_gelu", "all", norm_eps=1e-5))
    tokens = torch.randn(3, FRAMES, 7, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = xclip_block(Source(dict(theirs.named_parameters())))
    found = run_with(ours, weights, tokens)
    expected = theirs(tokens.flatten(0, 1), None).view_as(tokens)
    assert_same(found, expected)
    assert_same_gradients(probe(found), probe(expected), theirs, tokens)


def test_the_whole_cross_frame_encoder_is_xclips():
    theirs = perturbed(XCLIPVisionModel(xclip_config()))
    ours, clips = converted(theirs), clips_of(FRAMES)
    output = theirs(pixel_values(clips, ours).flatten(0, 1))
    class_token = output.pooler_output.view(3, FRAMES, -1).mean(1)
    tokens = theirs.post_layernorm(output.last_hidden_state[:, 1:]).reshape(3, -1, 48)
    encoded = run_encoder(ours, clips)
    assert_same(encoded.class_token, class_token)
    assert_same(encoded.tokens, tokens)
    found, expected = probe(encoded.class_token) + probe(encoded.tokens), probe(class_token) + probe(tokens)
    assert_same_gradients(found, expected, theirs)


@pytest.mark.parametrize("causal", [False, True])
def test_the_residual_attention_block_is_clips(causal):
    config = CLIPTextConfig(hidden_size=48, num_attention_heads=3, intermediate_size=96, attn_implementation="eager")
    theirs = perturbed(CLIPEncoderLayer(config))
    ours = Block(BlockConfig(48, 3, 2.0, "quick_gelu", "all", norm_eps=1e-5))
    tokens = torch.randn(3, 9, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    seen = causal_mask(9) if causal else None
    added = torch.zeros(3, 1, 9, 9).masked_fill(~seen, -torch.inf) if causal else None
    weights = clip_block(Source(dict(theirs.named_parameters())))
    found = run_with(ours, weights, tokens, seen)
    expected = theirs(tokens, added)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert_same(found, expected)
    assert_same_gradients(probe(found), probe(expected), theirs, tokens)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": False, "init_values": 0.1, "no_embed_class": True},
        {"qk_norm": True},
        {"pre_norm": True, "class_token": False, "global_pool": "avg"},
    ],
)
def test_one_frame_gives_the_class_token_and_the_logits_of_timms_vit(options):
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
    norm = {"norm_layer": lambda width, **kwargs: torch.nn.LayerNorm(width, eps=1e-6, **kwargs)}
    theirs = perturbed(VisionTransformer(**sizes, **norm, num_classes=CLASSES, **options))
    ours, clips = converted(theirs, heads=3), clips_of(1)
    images = pixel_values(clips, ours)[:, 0]
    expected, logits = theirs(images), run_classifier(ours, clips)
    assert_same(logits, expected)
    assert_same_gradients(probe(logits), probe(expected), theirs)
    if "cls_token" in dict(theirs.named_parameters()):
        assert_same(run_encoder(ours, clips).class_token, theirs.forward_features(images)[:, 0])


def test_what_the_weights_do_not_tell_comes_from_the_architecture_that_timms_config_names():
    config = {
        "architecture": "vit_base_patch16_clip_quickgelu_224",
        "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "input_size": [3, 32, 64]},
    }
    with torch.device("meta"):
        theirs = timm.create_model(config["architecture"], img_size=(32, 64))
    ours = converted(theirs, config)
    assert ours.encoder.activation == "quick_gelu"
    assert (ours.encoder.heads, ours.encoder.norm_eps, ours.encoder.input_norm) == (12, 1e-5, True)
    assert (ours.size, ours.mean, ours.std) == ((32, 64), (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
