"""A tiny VideoMAE trained side by side with transformers' on the same clips and masks: the same loss at every step."""

import numpy as np
import torch
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from pretrain.model.encoders import build_encoder
from pretrain.model.mae import MaskedAutoencoder
from pretrain.model.masking import MaskConfig, draw_mask
from pretrain.model.weights.layouts import convert
from pretrain.model.weights.source import Source
from tests.parity.references import SIZES, pixel_values
from tests.parity.test_videomae_parity import DECODER

STEPS, BATCH = 100, 3


def test_a_hundred_steps_of_adamw_give_transformers_losses():
    torch.manual_seed(0)
    config = VideoMAEConfig(**SIZES, **DECODER, patch_size=8, layer_norm_eps=1e-6, use_mean_pooling=False)
    theirs = VideoMAEForPreTraining(config)
    theirs.decoder.norm.eps = 1e-6
    model = convert(Source(theirs.state_dict(), config.to_dict()))
    ours = MaskedAutoencoder(build_encoder(model.encoder, model.frames, model.size), model.decoder.config)
    ours.load_state_dict({f"encoder.{name}": value for name, value in model.weights.items()} | model.decoder.weights)
    ours.decoder_embedding.bias.requires_grad_(False)  # theirs has none
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-3, weight_decay=0.05) for one in (theirs, ours)]
    losses = []
    clips = smooth_clips()
    for step in range(STEPS):
        drawn = [draw_mask(MaskConfig("tube", 0.75), model.grid, step * BATCH + n, 0) for n in range(BATCH)]
        visible, masked = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
        hidden = torch.zeros(BATCH, model.grid.tokens, dtype=torch.bool).scatter_(1, masked, True)
        pair = (
            theirs(pixel_values(clips, model), bool_masked_pos=hidden).loss,
            ours(clips, visible, masked).loss.mean(),
        )
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.item() for loss in pair])
    theirs_losses, our_losses = np.array(losses).T
    np.testing.assert_allclose(our_losses, theirs_losses, rtol=1e-4)
    assert our_losses[-10:].mean() < 0.9 * our_losses[:10].mean(), "nothing was learned, so little could have differed"


def smooth_clips() -> torch.Tensor:
    """Clips that can be learned: coarse noise, enlarged, which moves on from frame to frame."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(BATCH, 3, 5, 5, generator=generator)
    wide = torch.nn.functional.interpolate(coarse, (40, 40), mode="bicubic").clamp(0, 1)
    frames = [wide[:, :, 2 * t : 2 * t + 32, t : t + 32] for t in range(SIZES["num_frames"])]
    return (torch.stack(frames, 1).permute(0, 1, 3, 4, 2) * 255).to(torch.uint8)
