"""The configuration of a pretraining run: the parts' own dataclasses put together, and what must hold between them."""

import dataclasses
import math
from pathlib import Path
from typing import ClassVar

import numpy as np

from pretrain.commandline import find_recipe
from pretrain.data.config import DataConfig
from pretrain.data.order import nearest_divisor, nearest_multiple
from pretrain.engine.checkpoint import CheckpointConfig
from pretrain.engine.distributed import Precision
from pretrain.engine.optimizer import OptimizerConfig
from pretrain.engine.preemption import StoppingConfig
from pretrain.engine.profiling import steps_to_profile
from pretrain.engine.tracking import TrackingMode
from pretrain.errors import Refused
from pretrain.model.encoder import EncoderConfig
from pretrain.model.mae import DecoderConfig
from pretrain.model.masking import MaskConfig
from pretrain.model.tubelets import Grid, grid_of
from pretrain.packing import validate_packed


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Held-out samples: those of other shards, of another split, or a part of data.shards."""

    shards: str | None = None
    """Folder of held-out shards; with none of this, split, share and folds nothing is validated."""
    split: str | None = None
    """Split that is held out, of these shards or else of data.shards: a name such as test1, or a file of keys."""
    share: float | None = None
    """Share of data.shards that is held out, of every class alike and the same in every run."""
    folds: int | None = None
    """Parts that data.shards is divided into, of every class alike and the same in every run; one is held out."""
    fold: int | None = None
    """Which of the folds is held out, from 1."""
    group: str | None = None
    """Regular expression: samples in whose keys its groups find the same are never parted by share or folds; for UCF101
    (.*_g[0-9]+)_c. Segments of one video stay together without it."""
    seed: int = 0
    """Chooses the samples of share or folds."""
    every: int = 1000
    """Steps between validations."""
    samples: int = 1024
    """Held-out samples that are used, at most."""

    @property
    def divides(self) -> bool:
        """Whether the training set is divided, and a part of it held out."""
        return self.share is not None or self.folds is not None

    def validate(self, data: DataConfig) -> None:
        """Raises `Refused` for what cannot be, or not on this training set."""
        if self.every < 1 or self.samples < 1:
            raise Refused("validation.every, validation.samples: must be at least 1")
        if self.share is not None and not 0 < self.share < 1:
            raise Refused(f"validation.share: {self.share} must lie between 0 and 1")
        if self.folds is not None and self.folds < 2:
            raise Refused(f"validation.folds: {self.folds} must be at least 2")
        both_or_none = (self.folds is None) == (self.fold is None)
        if not both_or_none or not (self.fold is None or 1 <= self.fold <= (self.folds or 1)):
            raise Refused(
                f"validation.fold, validation.folds: fold {self.fold} of {self.folds} cannot be; give both, and a fold "
                "from 1 to folds"
            )
        chosen = ["share"] * (self.share is not None) + ["folds"] * (self.folds is not None)
        given = ["shards"] * (self.shards is not None) + ["split"] * (self.split is not None)
        if len(chosen) == 2 or (chosen and given):
            names = ", ".join(f"validation.{name}" for name in [*given, *chosen])
            raise Refused(f"{names}: each tells what is held out; give one of them")
        if not chosen and self.group is not None:
            raise Refused("validation.group: belongs to validation.share or validation.folds; give one of them")
        if not chosen and self.seed:
            raise Refused("validation.seed: belongs to validation.share or validation.folds; give one of them")
        if not 0 <= self.seed < 1 << 63:
            raise Refused(f"validation.seed: {self.seed} must be at least 0 and less than 2 ** 63")
        if data.mixture is not None and (chosen or given == ["split"]):
            name = (chosen or given)[0]
            raise Refused(
                f"validation.{name}: holds out a part of data.shards, and data.mixture names several sets; give "
                "validation.shards"
            )
        if given == ["split"] and data.split is None:
            raise Refused(
                f"validation.split: {self.split} is a split of data.shards, all of which would be trained on; give "
                "data.split too"
            )

    def chosen(self, samples: int) -> np.ndarray:
        """Returns the numbers of the samples that are used, ascending and spread evenly over a set of `samples`."""
        return spread_evenly(self.samples, samples)


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """What the features of the encoder are worth while it is trained, and whether they collapse."""

    shards: str | None = None
    """Folder of labelled shards, or its URL; None probes nothing."""
    asked: str | None = None
    """Labelled shards whose videos ask those of probe.shards; by default each of those asks all others."""
    every: int = 1000
    """Steps between probes; the first is made before training."""
    samples: int = 1024
    """Videos of each set that are used, at most."""
    stop_on_collapse: bool = False
    """End the run, with exit code 3, when its features have collapsed; else only warn."""

    def validate(self) -> None:
        """Raises `Refused` for what cannot be."""
        if self.every < 1:
            raise Refused("probe.every: must be at least 1")
        if self.samples < 2:
            raise Refused("probe.samples: must be at least 2")
        if self.shards is None and self.asked is not None:
            raise Refused("probe.shards: is missing; give the labelled shards that probe.asked asks")
        if self.shards is None and self.stop_on_collapse:
            raise Refused("probe.shards: is missing; probe.stop_on_collapse needs labelled shards to look at")

    def chosen(self, samples: int) -> np.ndarray:
        """Returns the numbers of the videos that are used, ascending and spread evenly over a set of `samples`."""
        return spread_evenly(self.samples, samples)


def spread_evenly(wanted: int, samples: int) -> np.ndarray:
    """Returns at most `wanted` of the numbers of `samples` samples, ascending and spread evenly."""
    return np.linspace(0, samples - 1, min(wanted, samples)).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What pretraining and finetuning share."""

    EITHER_OR: ClassVar[tuple[tuple[str, str], ...]] = (
        ("steps", "epochs"),
        ("data.shards", "data.mixture"),
        ("data.clip.frame_rate", "data.clip.stride"),
        ("optimizer.warmup_epochs", "optimizer.warmup_steps"),
    )

    out: str = "runs/pretrain"
    """Folder of the run."""
    seed: int = 0
    """Seed of the order, of every draw for a sample, and of the weights."""
    steps: int | None = None
    """Length of the run in optimiser steps; this or epochs."""
    epochs: float | None = None
    """Length of the run in passes over the set; this or steps."""
    resume: str = "auto"
    """auto goes on from the newest checkpoint, never starts afresh, a folder names a checkpoint."""
    override_config: bool = False
    """Go on although the checkpoint was written with another data.global_batch or mask; nothing else can be changed."""
    precision: Precision = "bf16"
    """Arithmetic of the forward and backward pass; fp16 needs a GPU."""
    compile: bool = False
    """Compile the model with torch.compile: faster steps after some minutes; needs triton on a GPU, g++ on a CPU."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and compute the rest again in the backward pass: less memory, slower steps."""
    deepspeed: str | None = None
    """DeepSpeed configuration: a name in configs/deepspeed, or a file; None is plain data parallelism."""
    tracking: TrackingMode = "auto"
    """W&B: auto when there is a key, wandb always (offline without network), none never."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    log_keys: bool = False
    """Write the keys of each step's samples to keys.jsonl, those of substitutes for bad samples included."""
    profile: str | None = None
    """Steps A:B as in metrics.jsonl of which rank 0 writes a trace to profile/; in YAML in quotes; None traces none."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Samples and clips."""
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    """Held-out samples."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """AdamW and the learning rate."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """Checkpoints."""
    stopping: StoppingConfig = dataclasses.field(default_factory=StoppingConfig)
    """Limits of time."""

    @property
    def deepspeed_file(self) -> Path | None:
        """The file of the DeepSpeed configuration, None without one; raises `Refused` where it is missing here."""
        return find_recipe(self.deepspeed, "deepspeed", ".json") if self.deepspeed else None

    def validate(self) -> None:
        """Raises `Refused` for whatever is wrong, before anything is allocated."""
        self.validate_run()

    def validate_run(self) -> None:
        """Raises `Refused` for whatever is wrong with the shared fields."""
        if self.data.shards and self.data.mixture is not None:
            raise Refused("data.shards, data.mixture: give one of them")
        if not self.data.shards and self.data.mixture is None:
            raise Refused("data.shards: is missing; give a folder that `tubelet pack` wrote")
        if (self.steps is None) == (self.epochs is None):
            raise Refused("steps, epochs: give exactly one of them")
        if not all(length is None or 0 < length < math.inf for length in (self.steps, self.epochs)):
            raise Refused("steps, epochs: must be greater than 0")
        if not 0 <= self.seed < 1 << 63:
            raise Refused(f"seed: {self.seed} must be at least 0 and less than 2 ** 63")
        if self.log_every < 1:
            raise Refused("log_every: must be at least 1")
        steps_to_profile(self.profile)
        self.data.validate()
        self.data.clip.validate()
        self.validation.validate(self.data)
        self.optimizer.validate()
        self.checkpoint.validate()
        self.stopping.validate()

    def accumulation(self, world: int) -> int:
        """Returns the micro-batches in a step; raises `Refused` where they do not come out even."""
        data = self.data
        if data.global_batch % world:
            raise Refused(
                f"data.global_batch: {data.global_batch} samples do not divide among {world} processes; use "
                f"{nearest_multiple(data.global_batch, world * data.micro_batch, data.lanes)}"
            )
        if data.global_batch % (world * data.micro_batch):
            raise Refused(
                f"data.micro_batch: {world} processes x {data.micro_batch} samples do not divide data.global_batch "
                f"{data.global_batch}; use {nearest_divisor(data.global_batch // world, data.micro_batch)}"
            )
        return data.global_batch // (world * data.micro_batch)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Returns the length of the run in steps; raises `Refused` if the warm-up does not fit in."""
        total = self.steps or max(round((self.epochs or 0) * steps_per_epoch), 1)
        traced = steps_to_profile(self.profile)
        if traced and traced[-1] > total:
            raise Refused(f"profile: {self.profile} goes past step {total}, the last of the run")
        warmup = self.optimizer.warmup(steps_per_epoch)
        if warmup >= total:
            raise Refused(
                f"optimizer.warmup_epochs: the warm-up takes {warmup} steps of a run of {total}; shorten it or "
                f"lengthen the run"
            )
        return total


@dataclasses.dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """A pretraining run."""

    init: str | None = None
    """Encoder folder or run to take the first weights from, without the optimiser."""
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    """The encoder, which is kept."""
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    """The decoder, which is thrown away."""
    mask: MaskConfig = dataclasses.field(default_factory=MaskConfig)
    """What the encoder does not see."""
    probe: ProbeConfig = dataclasses.field(default_factory=ProbeConfig)
    """Probe of the features, and the alarm that they collapse."""

    @property
    def grid(self) -> Grid:
        """The token grid of a clip where all have the same."""
        return grid_of(self.data.clip.frames, self.data.clip.size, self.encoder.tubelet)

    def validate(self) -> None:
        """Raises `Refused` for whatever is wrong, before anything is allocated."""
        self.validate_run()
        if self.data.packing is None:
            self.encoder.validate(self.data.clip.frames, self.data.clip.size)
            self.mask.validate(self.encoder.name, self.grid)
        else:
            validate_packed(self.data, self.encoder, "encoder", self.mask)
        self.decoder.validate()
        self.probe.validate()
