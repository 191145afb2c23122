"""Our encoder, masked autoencoder and mean-pooled classifier against transformers' VideoMAE, on the same weights."""

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel

from pretrain.model.masking import MaskConfig, draw_mask
from pretrain.model.tubelets import grid_of
from pretrain.model.weights.layouts import convert
from pretrain.model.weights.parts import ConvertedModel
from pretrain.model.weights.source import Source
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
    run_autoencoder,
    run_classifier,
    run_encoder,
)

DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}


def peer_config(**options) -> VideoMAEConfig:
    """Sizes of a small VideoMAE; the authors' epsilon is 1e-6."""
    return VideoMAEConfig(**SIZES, **DECODER, patch_size=PATCH, layer_norm_eps=1e-6, num_labels=CLASSES, **options)


@pytest.fixture(scope="module")
def theirs() -> VideoMAEForPreTraining:
    """A small VideoMAE of random weights, set as the authors' code is.

    `use_mean_pooling=False` keeps the final LayerNorm of the encoder, as the published pretraining weights have it.
    transformers leaves the decoder's last norm at torch's epsilon.
    """
    model = perturbed(VideoMAEForPreTraining(peer_config(use_mean_pooling=False)))
    model.decoder.norm.eps = 1e-6
    return model


@pytest.fixture
def ours(theirs) -> ConvertedModel:
    return converted(theirs)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return clips_of(FRAMES)


def masks(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Visible and masked numbers, and the same as VideoMAE's booleans; another mask for each clip."""
    grid = grid_of(FRAMES, SIZE, (2, PATCH, PATCH))
    drawn = [draw_mask(MaskConfig(name, 0.75), grid, key, 0) for key in range(3)]
    visible, masked = (torch.stack([torch.from_numpy(part) for part in parts]) for parts in zip(*drawn, strict=True))
    return visible, masked, torch.zeros(3, grid.tokens, dtype=torch.bool).scatter_(1, masked, True)


@torch.no_grad()
def test_the_encoder_gives_videomaes_tokens_of_a_whole_clip(ours, theirs, clips):
    assert_same(run_encoder(ours, clips).tokens, theirs.videomae(pixel_values(clips, ours)).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["tube", "random"])
def test_the_encoder_gives_videomaes_visible_tokens(ours, theirs, clips, mask):
    visible, _, hidden = masks(mask)
    expected = theirs.videomae(pixel_values(clips, ours), bool_masked_pos=hidden).last_hidden_state
    assert_same(run_encoder(ours, clips, visible).tokens, expected)


@pytest.mark.parametrize("mask", ["tube", "random"])
def test_loss_predictions_and_every_gradient_are_videomaes(ours, theirs, clips, mask):
    visible, masked, hidden = masks(mask)
    expected = theirs(pixel_values(clips, ours), bool_masked_pos=hidden)
    loss, prediction = run_autoencoder(ours, clips, visible, masked)
    assert_same(prediction, expected.logits)
    assert_same(loss.mean(), expected.loss)
    assert_same_gradients(loss.mean(), expected.loss, theirs)


@torch.no_grad()
def test_plain_pixel_targets_give_videomaes_loss_without_normalisation(ours, theirs, clips):
    visible, masked, hidden = masks("tube")
    plain = dataclasses.replace(
        ours, decoder=ours.decoder._replace(config=dataclasses.replace(ours.decoder.config, targets="pixels"))
    )
    theirs.config.norm_pix_loss = False
    try:
        expected = theirs(pixel_values(clips, ours), bool_masked_pos=hidden).loss
        assert converted(theirs).decoder.config.targets == "pixels"
    finally:
        theirs.config.norm_pix_loss = True
    assert_same(run_autoencoder(plain, clips, visible, masked).loss.mean(), expected)


def test_a_classifier_with_mean_pooling_gives_videomaes_logits_and_gradients(clips):
    """VideoMAE finetunes without the encoder's last norm: one norm stands behind the mean."""
    theirs = perturbed(VideoMAEForVideoClassification(peer_config(use_mean_pooling=True)))
    theirs.fc_norm.eps = 1e-6
    ours = converted(theirs)
    labels = torch.tensor([0, 3, 1])
    expected, logits = theirs(pixel_values(clips, ours), labels=labels), run_classifier(ours, clips)
    assert_same(logits, expected.logits)
    assert_same_gradients(torch.nn.functional.cross_entropy(logits, labels), expected.loss, theirs)


def test_an_encoder_alone_and_keys_of_old_releases_convert_alike(ours, theirs):
    config = peer_config(use_mean_pooling=False)
    alone = VideoMAEModel(config)
    alone.load_state_dict(theirs.videomae.state_dict())
    renamed = {
        name.replace("attention.query.bias", "attention.q_bias").replace(
            "attention.value.bias", "attention.v_bias"
        ): value
        for name, value in alone.state_dict().items()
    }
    assert renamed.keys() != alone.state_dict().keys()
    for weights in (alone.state_dict(), renamed):
        again = convert(Source(weights, config.to_dict()))
        assert again.decoder is None
        assert again.encoder == ours.encoder
        assert all(torch.equal(again.weights[name], value) for name, value in ours.weights.items())
