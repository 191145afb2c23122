"""Our encoder, masked autoencoder and mean-pooled classifier against transformers' VideoMAE, on the same weights."""

import pytest
import torch
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from finetune.classifier import Classifier
from finetune.config import HeadConfig
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import build_encoder
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder
from pretrain.model.masking import MaskConfig, draw_mask
from pretrain.model.tubelets import grid_of

FRAMES, SIZE, CLASSES = 4, 32, 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENCODER = EncoderConfig(name="joint", width=48, depth=2, heads=3, mlp_ratio=2.0, tubelet=(2, 8, 8))


def peer_config(use_mean_pooling: bool) -> VideoMAEConfig:
    """Sizes of a small VideoMAE; the authors' epsilon is 1e-6."""
    return VideoMAEConfig(
        image_size=SIZE,
        patch_size=8,
        num_frames=FRAMES,
        tubelet_size=2,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        layer_norm_eps=1e-6,
        qkv_bias=True,
        use_mean_pooling=use_mean_pooling,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        norm_pix_loss=True,
        num_labels=CLASSES,
    )


@pytest.fixture(scope="module")
def theirs() -> VideoMAEForPreTraining:
    """A small VideoMAE of random weights, set as the authors' code is.

    `use_mean_pooling=False` keeps the final LayerNorm of the encoder, as the published pretraining weights have it.
    transformers leaves the decoder's last norm at torch's epsilon.
    """
    torch.manual_seed(0)
    model = VideoMAEForPreTraining(peer_config(use_mean_pooling=False)).eval()
    model.decoder.norm.eps = 1e-6
    return perturbed(model)


@torch.no_grad()
def perturbed(model: nn.Module) -> nn.Module:
    """The model with its weights away from biases of zero and gains of one."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def ours(theirs) -> MaskedAutoencoder:
    """Our model with their weights, copied by name; every weight of both sides is used."""
    model = MaskedAutoencoder(
        build_encoder(ENCODER, FRAMES, SIZE, MEAN, STD), DecoderConfig(width=32, depth=2, heads=2, mlp_ratio=2.0)
    ).eval()
    blocks = {"encoder.blocks": theirs.videomae.encoder.layer, "decoder_blocks": theirs.decoder.decoder_layers}
    weights = converted(theirs, blocks)
    weights["decoder_embedding.bias"] = torch.zeros(32)  # theirs has none
    model.load_state_dict(weights, strict=True)
    return model


def converted(model: nn.Module, blocks: dict[str, nn.ModuleList]) -> dict[str, Tensor]:
    """Returns the weights of one of their models by our names; `blocks` tells where their layers are with us."""
    weights = {
        renamed(name): weight for name, weight in model.state_dict().items() if "attention.attention" not in name
    }
    convolution = weights["encoder.embedding.projection.weight"]  # (D, C, t, h, w)
    weights["encoder.embedding.projection.weight"] = convolution.permute(0, 2, 3, 4, 1).flatten(1)
    for our_blocks, their_layers in blocks.items():
        for number, layer in enumerate(their_layers):
            attention, prefix = layer.attention.attention, f"{our_blocks}.{number}.attention"
            projections = (attention.query.weight, attention.key.weight, attention.value.weight)
            weights[f"{prefix}.qkv.weight"] = torch.cat(projections)
            weights[f"{prefix}.query_bias"] = attention.query.bias
            weights[f"{prefix}.value_bias"] = attention.value.bias
    return weights


def renamed(name: str) -> str:
    for theirs_part, ours_part in (
        ("videomae.embeddings.patch_embeddings.", "encoder.embedding."),
        ("videomae.encoder.layer.", "encoder.blocks."),
        ("videomae.layernorm.", "encoder.norm."),
        ("encoder_to_decoder.", "decoder_embedding."),
        ("decoder.decoder_layers.", "decoder_blocks."),
        ("decoder.norm.", "decoder_norm."),
        ("decoder.head.", "decoder_head."),
        ("fc_norm.", "head.0."),
        ("classifier.", "head.2."),
        ("attention.output.dense.", "attention.projection."),
        ("intermediate.dense.", "mlp.fc1."),
        ("output.dense.", "mlp.fc2."),
        ("layernorm_before.", "attention_norm."),
        ("layernorm_after.", "mlp_norm."),
    ):
        name = name.replace(theirs_part, ours_part)
    return name


@pytest.fixture(scope="module")
def clips() -> Tensor:
    shape = (3, FRAMES, SIZE, SIZE, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def pixel_values(clips: Tensor) -> Tensor:
    """The clips as VideoMAE's processor hands them over: normalised, (B, T, C, H, W)."""
    return ((clips / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 1, 4, 2, 3)


def masks(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Visible and masked numbers, and the same as VideoMAE's booleans; another mask for each clip."""
    grid = grid_of(FRAMES, SIZE, (2, 8, 8))
    drawn = [draw_mask(MaskConfig(name, 0.75), grid, key, 0) for key in range(3)]
    visible, masked = (torch.stack([torch.from_numpy(part) for part in parts]) for parts in zip(*drawn, strict=True))
    return visible, masked, torch.zeros(3, grid.tokens, dtype=torch.bool).scatter_(1, masked, True)


@torch.no_grad()
def test_the_encoder_gives_videomaes_tokens_of_a_whole_clip(ours, theirs, clips):
    expected = theirs.videomae(pixel_values(clips)).last_hidden_state
    torch.testing.assert_close(ours.encoder(clips).tokens, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["tube", "random"])
def test_the_encoder_gives_videomaes_visible_tokens(ours, theirs, clips, mask):
    visible, _, hidden = masks(mask)
    expected = theirs.videomae(pixel_values(clips), bool_masked_pos=hidden).last_hidden_state
    torch.testing.assert_close(ours.encoder(clips, visible).tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", ["tube", "random"])
def test_loss_predictions_and_gradients_are_videomaes(ours, theirs, clips, mask):
    visible, masked, hidden = masks(mask)
    expected = theirs(pixel_values(clips), bool_masked_pos=hidden)
    loss, prediction = ours(clips, visible, masked)
    torch.testing.assert_close(prediction, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.mean(), expected.loss, atol=1e-5, rtol=0)

    ours.zero_grad()
    theirs.zero_grad()
    loss.mean().backward()
    expected.loss.backward()
    their_gradient = theirs.videomae.embeddings.patch_embeddings.projection.weight.grad
    our_gradient = ours.encoder.embedding.projection.weight.grad.unflatten(1, (2, 8, 8, 3)).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(ours.mask_token.grad, theirs.mask_token.grad, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_plain_pixel_targets_give_videomaes_loss_without_normalisation(ours, theirs, clips):
    visible, masked, hidden = masks("tube")
    theirs.config.norm_pix_loss = False
    plain = MaskedAutoencoder(ours.encoder, DecoderConfig(32, 2, 2, 2.0, targets="pixels")).eval()
    plain.load_state_dict(ours.state_dict())
    try:
        expected = theirs(pixel_values(clips), bool_masked_pos=hidden).loss
    finally:
        theirs.config.norm_pix_loss = True
    torch.testing.assert_close(plain(clips, visible, masked).loss.mean(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_classifier_with_mean_pooling_gives_videomaes_logits(clips):
    """VideoMAE finetunes without the encoder's last norm: one fresh norm stands behind the mean."""
    torch.manual_seed(3)
    theirs = perturbed(VideoMAEForVideoClassification(peer_config(use_mean_pooling=True)).eval())
    theirs.fc_norm.eps = 1e-6
    ours = Classifier(build_encoder(ENCODER, FRAMES, SIZE, MEAN, STD), HeadConfig(pool="mean"), CLASSES).eval()
    ours.load_state_dict(converted(theirs, {"encoder.blocks": theirs.videomae.encoder.layer}), strict=True)
    torch.testing.assert_close(ours(clips), theirs(pixel_values(clips)).logits, atol=1e-5, rtol=1e-5)
