"""What a pretraining step costs, as ratios: against transformers' VideoMAE, the encoders, activation checkpointing.

A step is forward, backward and fused AdamW. All models of a table run in one process on the same clips, dtype and
threads, in turns, so that a noisy machine hits them alike; a ratio is the median over the rounds, with the least and
the greatest. Transformers' model gets normalised floats, made outside the timed part; ours takes uint8 and normalises
within it. Where there is a GPU a further table compiles our model, computes in bf16 and tells clips per second, the
share of the device's own matrix multiplication rate (MFU) and peak memory.

Run with `make bench-model`; `--device cpu` leaves the GPU alone, `--quick` takes tiny models to try the code.
"""

import argparse
import dataclasses
import statistics
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import ENCODERS, build_encoder
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder
from tests.benchmarks.timed_steps import Ours, Setting, Step, in_turns, peaks, ratio, step_of_transformers

WANTED_SAME, WANTED_RECOMMENDED = 1.05, 2.3
"""Speed over transformers that is wanted of the same mathematics and of the recommended recipe, on 2 cores in fp32."""
WANTED_ON_GPU, WANTED_MFU = 2.5, 0.55
"""Speed over transformers and MFU that are wanted of the recommended recipe with L on a GPU in bf16."""

DECODERS = {
    "B": DecoderConfig(384, 4, 6),
    "L": DecoderConfig(512, 12, 8),
}  # those of the recipes videomae_b, videomae_l
TINY, TINY_DECODER = EncoderConfig(variant="Ti", depth=2, temporal_depth=1), DecoderConfig(64, 1, 2)


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
    times = in_turns(steps, rounds)
    peer = times.pop("transformers")
    print(
        f"ViT-{encoder.variant}, {setting.batch} clips of {setting.frames} x {setting.size} x {setting.size}, 90 % "
        f"tubes, fp32, {torch.get_num_threads()} threads, {rounds} rounds; transformers takes "
        f"{statistics.median(peer.clock):.2f} s and {memory['transformers']:.2f} GiB a step"
    )
    reached = []
    for (name, ours), wanted in zip(times.items(), (WANTED_SAME, WANTED_RECOMMENDED), strict=True):
        median, text = ratio(peer.clock, ours.clock)
        on_cores, _ = ratio(peer.cores, ours.cores)
        reached.append(median >= wanted)
        print(
            f"  {name:30s}{text} times as fast, wanted {wanted}; by the cores' time {on_cores:.2f}; "
            f"{memory[name]:.2f} GiB"
        )
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
    times = in_turns(steps, rounds)
    first = next(iter(steps))
    print(f"{title}; {first} takes {statistics.median(times[first].clock):.2f} s and {memory[first]:.2f} GiB a step")
    for name in list(steps)[1:]:
        _, text = ratio(times[name].clock, times[first].clock)
        on_cores, _ = ratio(times[name].cores, times[first].cores)
        print(
            f"  {name:30s}{text} of its time ({on_cores:.2f} of the cores'), "
            f"{memory[name] / memory[first]:.2f} of its memory"
        )


def matmul_rate(setting: Setting, length: int) -> float:
    """Returns the FLOP/s at which the device multiplies square bf16 matrices of a length."""
    one, other = torch.randn(2, length, length, device=setting.device).bfloat16().unbind()

    def multiply() -> None:
        for _ in range(20):
            one @ other
        if setting.device.type == "cuda":
            torch.cuda.synchronize()

    multiply()
    seconds = min(in_turns({"multiply": multiply}, 5)["multiply"].clock)
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
    times = in_turns(steps, rounds)
    peer = times.pop("transformers").clock
    print(
        f"ViT-{encoder.variant} in bf16, compiled, {setting.batch} clips of {setting.frames} x {setting.size} x "
        f"{setting.size}, {rounds} rounds; transformers, not compiled: "
        f"{setting.batch / statistics.median(peer):.1f} clips/s, {memory['transformers']:.2f} GiB"
    )
    for name, own in times.items():
        median, text = ratio(peer, own.clock)
        duration = statistics.median(own.clock)
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
