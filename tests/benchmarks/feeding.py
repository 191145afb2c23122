"""Copying batches to the GPU ahead of the step that needs them, against copying each when it is needed, as a ratio.

Both train the same ViT-S VideoMAE on the same pinned clips in turns; a third column computes on clips that lie on the
GPU already, which no feeding can beat. Every batch must arrive bit by bit; losses are compared too. The weights
stand still (no optimiser), so that rounds are alike. It needs a GPU, and says so where there is none. Run it with
`python -m tests.benchmarks.feeding`.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.data.randomness import key_for
from pretrain.engine.feeding import on_device
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import build_encoder
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder
from pretrain.model.masking import MaskConfig, draw_mask

FRAMES, SIZE, CLIPS, STEPS, ROUNDS = 16, 224, 64, 12, 7

Feed = Callable[[Iterable[Batch], torch.device], Iterator[Batch]]


def copied_when_needed(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yields batches on the device, each copied on the stream that computes when it is asked for."""
    for batch in batches:
        moved = {name: getattr(batch, name).to(device, non_blocking=True) for name in ("clips", "visible", "masked")}
        yield batch._replace(**moved)


def pinned_batches(model: MaskedAutoencoder) -> list[Batch]:
    """Returns batches of random clips with 90 % tube masks, as a loader with pinned memory leaves them."""
    mask = MaskConfig("tube", 0.9)
    batches = []
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)
        clips = torch.randint(0, 256, (CLIPS, FRAMES, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
        drawn = [draw_mask(mask, model.encoder.grid, key_for(number, clip), key_for(clip)) for clip in range(CLIPS)]
        visible, masked = (torch.stack([torch.from_numpy(one) for one in part]) for part in zip(*drawn, strict=True))
        labels = torch.zeros(CLIPS, dtype=torch.int64)
        tensors = (tensor.pin_memory() for tensor in (clips, labels, visible, masked))
        batches.append(Batch(*tensors, keys=[], padded=0, skipped=[]))
    return batches


def trained(model: MaskedAutoencoder, batches: Iterable[Batch]) -> list[Tensor]:
    """Computes losses and gradients of all batches and returns the losses, which may still be on their way."""
    losses = []
    for batch in batches:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(batch.clips, batch.visible, batch.masked).loss.mean()
        loss.backward()
        losses.append(loss.detach())
    return losses


def check_bits(feeds: dict[str, Feed], batches: list[Batch], device: torch.device) -> None:
    """Raises `AssertionError` unless every feed hands over the very batches, while the device is busy computing."""
    busy = torch.randn(4096, 4096, device=device)
    for name, feed in feeds.items():
        for given, batch in zip(batches, feed(batches, device), strict=True):
            busy = (busy @ busy).clamp(-1, 1)
            for field in ("clips", "visible", "masked"):
                assert torch.equal(getattr(batch, field).cpu(), getattr(given, field)), f"{name}: {field} differ"


def main() -> None:
    """Prints the medians and ranges of the ratios."""
    if not torch.cuda.is_available():
        print("copying ahead: needs a GPU, and PyTorch finds none here; nothing was measured")
        return
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(variant="S"), FRAMES, SIZE)
    model = MaskedAutoencoder(encoder, DecoderConfig(width=192, depth=4, heads=3)).to(device)
    batches = pinned_batches(model)
    resident = list(copied_when_needed(batches, device))
    feeds: dict[str, Feed] = {
        "copied when needed": copied_when_needed,
        "copied ahead": on_device,
        "on the GPU already": lambda batches, device: iter(resident),
    }
    check_bits(feeds, batches, device)
    seconds: dict[str, list[float]] = {name: [] for name in feeds}
    losses: dict[str, Tensor] = {}
    for round_number in range(ROUNDS + 1):
        for name, feed in feeds.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            losses[name] = torch.stack(trained(model, feed(batches, device)))
            torch.cuda.synchronize()
            if round_number:  # the first round warms up
                seconds[name].append((time.perf_counter() - started) / STEPS)
    needed = seconds["copied when needed"]
    print(f"{torch.cuda.get_device_name(device)}, ViT-S in bf16, {CLIPS} clips of {FRAMES} x {SIZE} x {SIZE} a step")
    for name, own in seconds.items():
        ratios = [before / now for before, now in zip(needed, own, strict=True)]
        print(
            f"{name:20s}{1000 * statistics.median(own):8.2f} ms a step, {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    reference = losses["on the GPU already"]
    spread = max(float((one - reference).abs().max()) for one in losses.values())
    print(f"batches are equal bit by bit; losses {'too' if spread == 0 else f'differ by up to {spread:.1e}'}")


if __name__ == "__main__":
    main()
