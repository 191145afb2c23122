"""What a pretraining step costs, as ratios: against transformers' VideoMAE, the encoders, activation checkpointing.

A step is forward, backward and fused AdamW. All models of a table run in one process on the same clips, dtype and
threads, in turns, so that a noisy machine hits them alike; a ratio is the median over the rounds, with the least and
the greatest. Transformers' model gets normalised floats, made outside the timed part; ours takes uint8 and normalises
within it. Where there is a GPU a further table compiles our model, computes in bf16 and tells clips per second, the
share of the device's own matrix multiplication rate (MFU) and peak memory.

Run with `make bench-model`; `--device cpu` leaves the GPU alone, `--quick` takes tiny models to try the code.
"""

import argparse
import ctypes
import dataclasses
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from pretrain.data.randomness import key_for
from pretrain.model.blocks import recompute_activations
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import ENCODERS, build_encoder
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder
from pretrain.model.masking import MaskConfig, draw_mask
from pretrain.model.tubelets import grid_of

WANTED_SAME, WANTED_RECOMMENDED = 1.05, 2.3
"""Speed over transformers that is wanted of the same mathematics and of the recommended recipe, on 2 cores in fp32."""
WANTED_ON_GPU, WANTED_MFU = 2.5, 0.55
"""Speed over transformers and MFU that are wanted of the recommended recipe with L on a GPU in bf16."""

DECODERS = {
    "B": DecoderConfig(384, 4, 6),
    "L": DecoderConfig(512, 12, 8),
}  # those of the recipes videomae_b, videomae_l
TINY, TINY_DECODER = EncoderConfig(variant="Ti", depth=2, temporal_depth=1), DecoderConfig(64, 1, 2)

Step = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all models of a table share.

    Attributes:
        device: Where they run.
        batch: Clips in a step, B.
        frames: Frames of a clip.
        size: Height and width of a clip in pixels.
        autocast: Compute in bf16; else in fp32.
    """

    device: torch.device
    batch: int
    frames: int = 16
    size: int = 224
    autocast: bool = False

    def clips(self) -> Tensor:
        """Returns `(B, T, H, W, 3)` uint8."""
        torch.manual_seed(0)
        shape = (self.batch, self.frames, self.size, self.size, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8).to(self.device)

    def masks(self, decoded: float) -> tuple[Tensor, Tensor]:
        """Returns the visible and the masked token numbers of 90 % tubes, and of the masked ones the share decoded."""
        grid = grid_of(self.frames, self.size, (2, 16, 16))
        mask = MaskConfig("tube", 0.9, decoded)
        drawn = [draw_mask(mask, grid, key_for(clip), key_for(clip, 1)) for clip in range(self.batch)]
        visible, masked = (torch.stack([torch.from_numpy(one) for one in part]) for part in zip(*drawn, strict=True))
        return visible.to(self.device), masked.to(self.device)

    def step_of(self, model: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
        """Returns forward, backward and update of a model, until the device is done."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

        def step() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return step


class Ours(NamedTuple):
    """A model of ours to measure.

    Attributes:
        encoder: Its encoder.
        decoder: Its decoder.
        decoded: Share of the masked tokens that is reconstructed.
        recomputes: Whether the backward pass computes activations again.
        compiled: Whether torch.compile compiles it.
    """

    encoder: EncoderConfig
    decoder: DecoderConfig
    decoded: float = 1.0
    recomputes: bool = False
    compiled: bool = False

    def step(self, setting: Setting) -> Step:
        """Returns its step."""
        torch.manual_seed(0)
        encoder = build_encoder(self.encoder, setting.frames, setting.size)
        model = MaskedAutoencoder(encoder, self.decoder).to(setting.device)
        if self.recomputes:
            recompute_activations(model)
        if self.compiled:
            model.compile(fullgraph=True)
        clips, (visible, masked) = setting.clips(), setting.masks(self.decoded)
        return setting.step_of(model, lambda: model(clips, visible, masked).loss.mean())


def step_of_transformers(encoder: EncoderConfig, decoder: DecoderConfig, setting: Setting) -> Step:
    """Returns a step of `VideoMAEForPreTraining` with the same sizes."""
    width, depth, heads, mlp_ratio = encoder.sizes()
    config = VideoMAEConfig(
        image_size=setting.size,
        num_frames=setting.frames,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=round(width * mlp_ratio),
        decoder_hidden_size=decoder.width,
        decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.heads,
        decoder_intermediate_size=4 * decoder.width,
        norm_pix_loss=True,
    )
    torch.manual_seed(0)
    model = VideoMAEForPreTraining(config).to(setting.device)
    visible, _ = setting.masks(1.0)
    hidden = torch.ones(setting.batch, model.videomae.embeddings.num_patches, dtype=torch.bool, device=setting.device)
    hidden.scatter_(1, visible, False)
    mean, std = (torch.tensor(part, device=setting.device) for part in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = ((setting.clips().float() / 255 - mean) / std).permute(0, 1, 4, 2, 3).contiguous()
    return setting.step_of(model, lambda: model(pixels, bool_masked_pos=hidden).loss)


class Watch:
    """Measures the peak of the memory that a block of code adds: the GPU's, or the process's own.

    Attributes:
        peak_gib: The greatest addition.
    """

    def __init__(self, device: torch.device) -> None:
        """Takes the device whose memory counts."""
        self.device = device
        self.peak_gib = 0.0

    def __enter__(self) -> "Watch":
        """Begins, once memory that is free but kept has been given back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        ctypes.CDLL(None).malloc_trim(0)
        process = psutil.Process()
        self._before, self._over, self._peak = process.memory_info().rss, threading.Event(), 0

        def sample() -> None:
            while not self._over.wait(0.005):
                self._peak = max(self._peak, process.memory_info().rss)

        self._sampler = threading.Thread(target=sample)
        self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Ends."""
        if self.device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated()
        else:
            self._over.set()
            self._sampler.join()
        self.peak_gib = max(self._peak - self._before, 0) / 2**30


def peaks(steps: dict[str, Step], device: torch.device) -> dict[str, float]:
    """Returns the memory in GiB that one step of each adds to weights, gradients and moments that are there already."""
    found = {}
    for name, step in steps.items():
        step()
        with Watch(device) as watch:
            step()
        found[name] = watch.peak_gib
    return found


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds that a step of each took in each round; the first of a round is another in the next."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(over: list[float], under: list[float]) -> tuple[float, str]:
    """Returns the median of the rounds' ratios, and that with their range as text."""
    ratios = [one / other for one, other in zip(over, under, strict=True)]
    median = statistics.median(ratios)
    return median, f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def across(decoder: DecoderConfig) -> DecoderConfig:
    """Returns the decoder of the recommended recipe, configs/pretrain/videomae_b_cross.yaml, in the size of another."""
    return dataclasses.replace(decoder, attention="cross")


def compare_with_transformers(setting: Setting, encoder: EncoderConfig, decoder: DecoderConfig, rounds: int) -> bool:
    """Prints the speed of a step over transformers'; returns whether it is as wanted."""
    steps = {
        "transformers": step_of_transformers(encoder, decoder, setting),
        "same mathematics": Ours(encoder, decoder).step(setting),
        "recommended recipe": Ours(encoder, across(decoder), decoded=0.25).step(setting),
    }
    memory = peaks(steps, setting.device)
    seconds = in_turns(steps, rounds)
    peer = seconds.pop("transformers")
    print(
        f"ViT-{encoder.variant}, {setting.batch} clips of {setting.frames} x {setting.size} x {setting.size}, 90 % "
        f"tubes, fp32, {torch.get_num_threads()} threads, {rounds} rounds; transformers takes "
        f"{statistics.median(peer):.2f} s and {memory['transformers']:.2f} GiB a step"
    )
    reached = []
    for (name, ours), wanted in zip(seconds.items(), (WANTED_SAME, WANTED_RECOMMENDED), strict=True):
        median, text = ratio(peer, ours)
        reached.append(median >= wanted)
        print(f"  {name:30s}{text} times as fast, wanted {wanted}; {memory[name]:.2f} GiB")
    return all(reached)


def compare_encoders(setting: Setting, encoder: EncoderConfig, rounds: int) -> None:
    """Prints what the encoders cost on every token of longer clips, as in finetuning, as ratios to the joint one."""
    clips, steps = setting.clips(), {}
    for name in ENCODERS:
        model = build_encoder(dataclasses.replace(encoder, name=name), setting.frames, setting.size).to(setting.device)
        steps[name] = setting.step_of(model, lambda model=model: model(clips).mean().square().mean())
    title = f"encoders, ViT-{encoder.variant}, every token of {setting.batch} clips of {setting.frames} frames"
    print_costs(title, steps, setting, rounds)


def compare_checkpointing(setting: Setting, encoder: EncoderConfig, decoder: DecoderConfig, rounds: int) -> None:
    """Prints what activation checkpointing costs in time and saves in memory."""
    steps = {
        "keeping activations": Ours(encoder, decoder).step(setting),
        "activation checkpointing": Ours(encoder, decoder, recomputes=True).step(setting),
    }
    print_costs(f"activation checkpointing, ViT-{encoder.variant}, {setting.batch} clips", steps, setting, rounds)


def print_costs(title: str, steps: dict[str, Step], setting: Setting, rounds: int) -> None:
    """Prints time and memory of each step as ratios to the first."""
    memory = peaks(steps, setting.device)
    seconds = in_turns(steps, rounds)
    first = next(iter(steps))
    print(f"{title}; {first} takes {statistics.median(seconds[first]):.2f} s and {memory[first]:.2f} GiB a step")
    for name in list(steps)[1:]:
        _, text = ratio(seconds[name], seconds[first])
        print(f"  {name:30s}{text} of its time, {memory[name] / memory[first]:.2f} of its memory")


def matmul_rate(setting: Setting, length: int) -> float:
    """Returns the FLOP/s at which the device multiplies square bf16 matrices of a length."""
    one, other = torch.randn(2, length, length, device=setting.device).bfloat16().unbind()

    def multiply() -> None:
        for _ in range(20):
            one @ other
        if setting.device.type == "cuda":
            torch.cuda.synchronize()

    multiply()
    seconds = min(in_turns({"multiply": multiply}, 5)["multiply"])
    return 20 * 2 * length**3 / seconds


def flops_of(ours: Ours, setting: Setting) -> int:
    """Returns the floating-point operations of a step, forward and backward, each activation counted once."""
    with torch.device("meta"):
        model = MaskedAutoencoder(build_encoder(ours.encoder, setting.frames, setting.size), ours.decoder)
    one = dataclasses.replace(setting, device=torch.device("cpu"), batch=1)
    inputs = [part.to("meta") for part in (one.clips(), *one.masks(ours.decoded))]
    with FlopCounterMode(display=False) as counter:
        model(*inputs).loss.mean().backward()
    return setting.batch * counter.get_total_flops()


def compare_in_bf16(setting: Setting, encoder: EncoderConfig, decoder: DecoderConfig, rate: float, rounds: int) -> bool:
    """Prints speed, MFU and memory in bf16 against transformers' eager model; returns whether they are as wanted."""
    ours = {
        "same mathematics": Ours(encoder, decoder, compiled=True),
        "recommended recipe": Ours(encoder, across(decoder), decoded=0.25, compiled=True),
    }
    steps = {"transformers": step_of_transformers(encoder, decoder, setting)}
    steps |= {name: one.step(setting) for name, one in ours.items()}
    memory = peaks(steps, setting.device)
    seconds = in_turns(steps, rounds)
    peer = seconds.pop("transformers")
    print(
        f"ViT-{encoder.variant} in bf16, compiled, {setting.batch} clips of {setting.frames} x {setting.size} x "
        f"{setting.size}, {rounds} rounds; transformers, not compiled: "
        f"{setting.batch / statistics.median(peer):.1f} clips/s, {memory['transformers']:.2f} GiB"
    )
    for name, own in seconds.items():
        median, text = ratio(peer, own)
        duration = statistics.median(own)
        mfu = flops_of(ours[name], setting) / duration / rate
        print(
            f"  {name:30s}{text} times as fast; {setting.batch / duration:.1f} clips/s, MFU {100 * mfu:.0f} %, "
            f"{memory[name]:.2f} GiB"
        )
    return median >= WANTED_ON_GPU and (encoder.variant != "L" or mfu >= WANTED_MFU)


def measure_on_cpu(quick: bool) -> bool:
    """Prints the tables in fp32 on the CPU; returns whether all is as wanted."""
    device = torch.device("cpu")
    encoder, decoder = (TINY, TINY_DECODER) if quick else (EncoderConfig(variant="B"), DECODERS["B"])
    setting = Setting(device, 2, frames=4, size=64) if quick else Setting(device, 4)
    longer = dataclasses.replace(setting, batch=1, frames=2 * setting.frames)
    rounds = 2 if quick else 5
    reached = compare_with_transformers(setting, encoder, decoder, rounds)
    compare_checkpointing(setting, encoder, decoder, min(rounds, 3))
    compare_encoders(longer, encoder if quick else EncoderConfig(variant="S"), min(rounds, 3))
    return reached


def measure_in_bf16(device: torch.device, quick: bool) -> bool:
    """Prints the tables in bf16 with compilation; returns whether all is as wanted."""
    setting = Setting(device, 2, 4, 64, autocast=True) if quick else Setting(device, 64, autocast=True)
    rate = matmul_rate(setting, 256 if quick else 8192)
    print(f"bf16 matrices are multiplied at {rate / 1e12:.3g} TFLOP/s")
    if quick:
        return compare_in_bf16(setting, TINY, TINY_DECODER, rate, rounds=2)
    reached = [
        compare_in_bf16(
            dataclasses.replace(setting, batch=batch), EncoderConfig(variant=variant), DECODERS[variant], rate, 10
        )
        for variant, batch in (("B", 64), ("L", 32))
    ]
    return all(reached)


def main() -> None:
    """Prints the tables, and last whether what is wanted was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the CPU, and the GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="tiny models, for the code's sake; bf16 on the CPU too")
    given = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    reached = {}
    if given.device != "cuda":
        reached["fp32 on the CPU"] = measure_on_cpu(given.quick)
    if given.device == "cuda" or (given.device is None and torch.cuda.is_available()):
        reached["bf16 on the GPU"] = measure_in_bf16(torch.device("cuda"), given.quick)
    elif given.quick:
        reached["bf16 on the CPU"] = measure_in_bf16(torch.device("cpu"), given.quick)
    print("; ".join(f"{name}: {'reached' if done else 'NOT reached'} what is wanted" for name, done in reached.items()))


if __name__ == "__main__":
    main()
