"""Every encoder with every mask and decoder that the table allows learns from real clips."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.data.video import open_video
from pretrain.model.compatibility import DECODERS, GUARANTEES, NEEDS, fits
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import build_encoder
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder
from pretrain.model.masking import MaskConfig, draw_mask, mask_counts
from tests.videos import make_video

FRAMES, SIZE, CLIPS, STEPS = 8, 16, 4, 30
SHARE_LOST = 0.15
"""The least share of its first value that every loss must lose."""

COMBINATIONS = [
    (encoder, kind, decoder) for encoder in NEEDS for kind in GUARANTEES if fits(encoder, kind) for decoder in DECODERS
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Tensor:
    """Clips of H.264 videos, `(B, T, H, W, C)` uint8."""
    folder: Path = tmp_path_factory.mktemp("videos")
    videos = [make_video(folder / f"{seed}.mp4", FRAMES, height=SIZE, width=SIZE, seed=seed) for seed in range(CLIPS)]
    frames = [open_video(video.read_bytes(), "auto").read(list(range(FRAMES))) for video in videos]
    return torch.stack([torch.as_tensor(one) for one in frames])


def mask_of(kind: str) -> MaskConfig:
    if kind == "short block":
        return MaskConfig("block", ratio=0.5, block_slots=2, blocks=4, block_area=0.3)
    return MaskConfig(kind, ratio=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("encoder", "kind", "decoder"), COMBINATIONS)
def test_the_loss_falls(encoder, kind, decoder, clips):
    torch.manual_seed(0)
    architecture = EncoderConfig(
        encoder, width=48, depth=1, heads=2, mlp_ratio=2.0, temporal_depth=1, tubelet=(2, 8, 8), positions="sincos_3d"
    )
    mask, built = mask_of(kind), build_encoder(architecture, FRAMES, SIZE)
    architecture.validate(FRAMES, SIZE)
    mask.validate(encoder, built.grid)
    config = DecoderConfig(48, 1, 2, 2.0, attention=decoder)
    model = MaskedAutoencoder(built, config, mask_counts(mask, built.grid).visible_slots)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        drawn = [draw_mask(mask, built.grid, 1 + step * CLIPS + clip, 1) for clip in range(CLIPS)]
        visible, masked = (torch.stack([torch.from_numpy(one) for one in part]) for part in zip(*drawn, strict=True))
        loss = model(clips, visible, masked).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) / 3 < (1 - SHARE_LOST) * losses[0]
