"""Layouts of the authors' own programs, and VideoMAE's layout out: written, loaded by transformers, equal again.

No package has the authors' models, so state dicts in their layouts are made here of transformers' and timm's weights,
after `modeling_pretrain.py` and `modeling_finetune.py` of MCG-NJU/VideoMAE and `models_mae.py` and `models_vit.py` of
facebookresearch/mae.
"""

import pytest
import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

from launch.cli import main
from pretrain.model.weights.layouts import convert
from pretrain.model.weights.source import Source
from tests.parity.references import (
    CLASSES,
    FRAMES,
    PATCH,
    SIZE,
    assert_same,
    clips_of,
    converted,
    perturbed,
    pixel_values,
)
from tests.parity.test_videomae_parity import masks, peer_config

AUTHORS_NAMES = (
    ("videomae.embeddings.patch_embeddings.projection.", "encoder.patch_embed.proj."),
    ("videomae.encoder.layer.", "encoder.blocks."),
    ("videomae.layernorm.", "encoder.norm."),
    ("decoder.decoder_layers.", "decoder.blocks."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("attention.output.dense.", "attn.proj."),
    ("attention.attention.query.bias", "attn.q_bias"),
    ("attention.attention.value.bias", "attn.v_bias"),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("classifier.", "head."),
)


def in_the_authors_layout(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of transformers' VideoMAE as MCG-NJU publishes theirs; a finetuned model's have no `encoder.`."""
    weights = {}
    for name, value in model.state_dict().items():
        for theirs, authors in AUTHORS_NAMES:
            name = name.replace(theirs, authors)
        weights[name] = value
    for name in [name for name in weights if name.endswith("attention.attention.query.weight")]:
        block = name.removesuffix("attention.attention.query.weight")
        parts = [weights.pop(f"{block}attention.attention.{part}.weight") for part in ("query", "key", "value")]
        weights[f"{block}attn.qkv.weight"] = torch.cat(parts)
    if "head.weight" in weights:
        weights = {name.removeprefix("encoder."): value for name, value in weights.items()}
    return weights


@pytest.fixture(scope="module")
def pretraining() -> VideoMAEForPreTraining:
    return perturbed(VideoMAEForPreTraining(peer_config(use_mean_pooling=False)))


@pytest.fixture(scope="module")
def classification() -> VideoMAEForVideoClassification:
    names = {number: f"class {number}" for number in range(CLASSES)}
    config = peer_config(use_mean_pooling=True)
    config.id2label, config.label2id = names, {name: number for number, name in names.items()}
    return perturbed(VideoMAEForVideoClassification(config))


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_authors_pretrained_layout_is_the_same_autoencoder(pretraining):
    weights = in_the_authors_layout(pretraining)
    assert {"encoder.blocks.1.attn.q_bias", "encoder_to_decoder.weight", "decoder.head.bias"} <= weights.keys()
    found, expected = convert(Source(weights, heads=3)), converted(pretraining)
    assert found.encoder == expected.encoder
    assert equal(found.weights, expected.weights)
    assert equal(found.decoder.weights, expected.decoder.weights)
    assert (found.frames, found.size) == (16, (224, 224)), "which no file tells: those of all published models"


def test_the_authors_finetuned_layout_is_the_same_classifier(classification):
    weights = in_the_authors_layout(classification)
    assert {"blocks.0.norm1.weight", "fc_norm.weight", "head.weight"} <= weights.keys()
    found, expected = convert(Source(weights, heads=3)), converted(classification)
    assert equal(found.weights, expected.weights)
    assert found.head.pool == expected.head.pool == "mean"
    assert equal(found.head.weights, expected.head.weights)


def test_maes_pretrained_and_finetuned_layouts_are_timms_with_a_decoder_and_with_another_norm():
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
    vit = perturbed(VisionTransformer(**sizes, num_classes=CLASSES))
    expected = converted(vit, heads=3)
    encoder = {name: value for name, value in vit.state_dict().items() if not name.startswith("head.")}
    decoder = {
        "mask_token": torch.zeros(1, 1, 32),
        "decoder_embed.weight": torch.zeros(32, 48),
        "decoder_embed.bias": torch.zeros(32),
        "decoder_pos_embed": torch.zeros(1, 17, 32),
        "decoder_blocks.0.norm1.weight": torch.zeros(32),
        "decoder_norm.weight": torch.zeros(32),
        "decoder_pred.weight": torch.zeros(192, 32),
    }
    pretrained = convert(Source(encoder | decoder, heads=3))
    assert equal(pretrained.weights, expected.weights)
    assert pretrained.left_out[:2] == ("mask_token", "decoder_embed")
    finetuned = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: value
        for name, value in vit.state_dict().items()
    }
    found = convert(Source(finetuned, heads=3))
    assert equal(found.weights, expected.weights)
    assert found.head is None
    assert found.left_out == ("head",), "a mean beside a class token is no head of ours"


@torch.no_grad()
def test_a_pretraining_model_written_out_loads_in_transformers_and_reconstructs_the_same(pretraining, tmp_path):
    pretraining.save_pretrained(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "out"), "--to", "huggingface"]) == 0
    again = loaded_without_a_word(VideoMAEForPreTraining, tmp_path / "out")
    pixels, hidden = pixel_values(clips_of(FRAMES), converted(pretraining)), masks("tube")[2]
    expected, found = (model(pixels, bool_masked_pos=hidden) for model in (pretraining, again))
    assert_same(found.logits, expected.logits)
    assert_same(found.loss, expected.loss)


@torch.no_grad()
def test_a_classifier_goes_through_tubelets_own_folder_to_transformers_and_back(classification, tmp_path):
    classification.save_pretrained(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "huggingface"]) == 0
    again = loaded_without_a_word(VideoMAEForVideoClassification, tmp_path / "out")
    assert again.config.id2label == classification.config.id2label
    pixels = pixel_values(clips_of(FRAMES), converted(classification))
    assert_same(again(pixels).logits, classification(pixels).logits)


@torch.no_grad()
def test_an_encoder_written_out_loads_as_the_model_without_a_head(pretraining, tmp_path):
    pretraining.save_pretrained(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "huggingface"]) == 0
    again = loaded_without_a_word(transformers.VideoMAEModel, tmp_path / "out")
    pixels = pixel_values(clips_of(FRAMES), converted(pretraining))
    assert_same(again(pixels).last_hidden_state, pretraining.videomae(pixels).last_hidden_state)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)


def loaded_without_a_word(kind, folder):
    """A model of transformers from a folder, of which every weight was used and every one was there."""
    model, said = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    return model.eval()
