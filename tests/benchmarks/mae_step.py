"""One training step of ViT-S VideoMAE, ours against transformers' `VideoMAEForPreTraining`, as ratios.

Both run in one process on the same clips with a 90 % tube mask, in turns, so that a noisy machine hits both alike.
Run with `make bench`.
"""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from pretrain.data.randomness import key_for
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import build_encoder
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder
from pretrain.model.masking import MaskConfig, draw_mask

FRAMES, SIZE, CLIPS, ROUNDS = 16, 224, 2, 7


def peer_step(clips: torch.Tensor, visible: torch.Tensor) -> Callable[[], None]:
    """Returns a step of transformers' model; it takes normalised floats (B, T, C, H, W) and a mask of booleans."""
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    decoder = {"decoder_hidden_size": 192, "decoder_num_attention_heads": 3, "decoder_intermediate_size": 768}
    model = VideoMAEForPreTraining(VideoMAEConfig(**sizes, **decoder, norm_pix_loss=True))
    pixels = ((clips.float() / 255 - 0.45) / 0.225).permute(0, 1, 4, 2, 3)
    masked = torch.ones(CLIPS, FRAMES // 2 * (SIZE // 16) ** 2, dtype=torch.bool).scatter(1, visible, False)
    return lambda: model(pixels, bool_masked_pos=masked).loss.backward()


def our_step(clips: torch.Tensor, decoded: float) -> tuple[Callable[[], None], torch.Tensor]:
    """Returns a step of our model that decodes a share of the masked tokens, and the visible token numbers."""
    model = MaskedAutoencoder(
        build_encoder(EncoderConfig(variant="S"), FRAMES, SIZE), DecoderConfig(width=192, depth=4, heads=3)
    )
    mask = MaskConfig("tube", 0.9, decoded)
    drawn = [draw_mask(mask, model.encoder.grid, key_for(clip), key_for(clip, 1)) for clip in range(CLIPS)]
    visible, masked = (torch.stack([torch.from_numpy(one) for one in part]) for part in zip(*drawn, strict=True))
    return lambda: model(clips, visible, masked).loss.mean().backward(), visible


def main() -> None:
    """Prints the median and the range of the ratios."""
    clips = torch.randint(0, 256, (CLIPS, FRAMES, SIZE, SIZE, 3), dtype=torch.uint8)
    whole, visible = our_step(clips, 1.0)
    half, _ = our_step(clips, 0.5)
    steps = {"transformers": peer_step(clips, visible), "all masked tokens": whole, "half of them": half}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(ROUNDS + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    peer = seconds.pop("transformers")
    print(
        f"ViT-S, {CLIPS} clips of {FRAMES} x {SIZE} x {SIZE}, fp32, {torch.get_num_threads()} threads, {ROUNDS} rounds"
    )
    for name, ours in seconds.items():
        ratios = [theirs / own for theirs, own in zip(peer, ours, strict=True)]
        print(
            f"decoding {name}: {statistics.median(ratios):.2f} times as fast as transformers "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
