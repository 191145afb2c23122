"""Training steps to be measured, ours and transformers', and how their time and memory are taken, in turns."""

import ctypes
import dataclasses
import gc
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from pretrain.data.randomness import key_for
from pretrain.model.blocks import recompute_activations
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import build_encoder
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder
from pretrain.model.masking import MaskConfig, draw_mask
from pretrain.model.tubelets import grid_of

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

    def normalised(self) -> Tensor:
        """Returns the clips as transformers' models take them: floats `(B, T, 3, H, W)`."""
        mean, std = (torch.tensor(part, device=self.device) for part in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return ((self.clips().float() / 255 - mean) / std).permute(0, 1, 4, 2, 3).contiguous()

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


def transformers_config(encoder: EncoderConfig, setting: Setting, **others: Any) -> VideoMAEConfig:
    """Returns transformers' configuration of an encoder of the same sizes; `others` are its further fields."""
    width, depth, heads, mlp_ratio = encoder.sizes()
    return VideoMAEConfig(
        image_size=setting.size,
        num_frames=setting.frames,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=round(width * mlp_ratio),
        **others,
    )


def step_of_transformers(encoder: EncoderConfig, decoder: DecoderConfig, setting: Setting) -> Step:
    """Returns a step of `VideoMAEForPreTraining` with the same sizes."""
    config = transformers_config(
        encoder,
        setting,
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
    pixels = setting.normalised()
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


class Times(NamedTuple):
    """Seconds that a step took in each round: by the clock, and of all cores together.

    Attributes:
        clock: What somebody waits.
        cores: What other programs on the machine do not stretch; means nothing on a GPU.
    """

    clock: list[float]
    cores: list[float]


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, Times]:
    """Returns the times of a step of each; the first of a round is another one in the next."""
    times = {name: Times([], []) for name in steps}
    names = list(steps)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started, started_on_cores = time.perf_counter(), time.process_time()
            steps[name]()
            times[name].clock.append(time.perf_counter() - started)
            times[name].cores.append(time.process_time() - started_on_cores)
    return times


def ratio(over: list[float], under: list[float]) -> tuple[float, str]:
    """Returns the median of the rounds' ratios, and that with their range as text."""
    ratios = [one / other for one, other in zip(over, under, strict=True)]
    median = statistics.median(ratios)
    return median, f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
