"""The configuration of a finetuning run."""

import dataclasses
import math
from typing import Literal

from pretrain.config import RunConfig, ValidationConfig
from pretrain.engine.averaging import AverageConfig
from pretrain.engine.compiler import refuse_divided_weights
from pretrain.errors import Refused
from pretrain.model.encoder import EncoderConfig


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """What stands on the encoder."""

    pool: Literal["class_token", "mean", "attention"] = "class_token"
    """What the head reads: a class token added to the pretrained encoder, the mean of its tokens, or what a learned
    query finds in them."""
    hidden: tuple[int, ...] = ()
    """Widths of the head's hidden layers; none is one linear layer."""
    dropout: float = 0.0
    """Dropout before the last layer."""
    init_scale: float = 0.001
    """Factor on the last layer's first weights, so that training starts from even odds."""

    def validate(self) -> None:
        """Raises `Refused` for values that cannot be."""
        if not 0 <= self.dropout < 1:
            raise Refused(f"head.dropout: {self.dropout} must be at least 0 and less than 1")
        if self.init_scale <= 0 or any(width < 1 for width in self.hidden):
            raise Refused("head.init_scale, head.hidden: must be greater than 0")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685), trained in place of the pretrained weights; needs peft."""

    rank: int | None = None
    """Rank of the adapters, such as 8; None has none."""
    alpha: float = 16.0
    """What adapters return is scaled by alpha / rank, so that another rank needs no other learning rate."""
    dropout: float = 0.0
    """Dropout before the adapters."""
    targets: Literal["attention", "mlp", "all"] = "attention"
    """Linear layers of the blocks that have adapters: those of attention, those of the MLPs, or all."""

    @property
    def scale(self) -> float:
        """Factor on what adapters return."""
        return self.alpha / (self.rank or 1)

    def validate(self) -> None:
        """Raises `Refused` for values that cannot be, or that have no adapters to tell of."""
        if self.rank is None:
            given = [
                name for name in ("alpha", "dropout", "targets") if getattr(self, name) != getattr(LoraConfig, name)
            ]
            if given:
                raise Refused(f"lora.rank: is missing; lora.{given[0]} needs it, such as 8")
            return
        if self.rank < 1:
            raise Refused(f"lora.rank: {self.rank} must be at least 1; leave it out to have no adapters")
        if not 0 < self.alpha < math.inf:
            raise Refused(f"lora.alpha: {self.alpha} must be greater than 0")
        if not 0 <= self.dropout < 1:
            raise Refused(f"lora.dropout: {self.dropout} must be at least 0 and less than 1")


@dataclasses.dataclass(frozen=True)
class MixingConfig:
    """Regularisation by mixed clips and softened labels (timm's Mixup)."""

    mixup: float = 0.0
    """Alpha of mixup (arXiv 1710.09412); 0 is none."""
    cutmix: float = 0.0
    """Alpha of cutmix (arXiv 1905.04899); 0 is none."""
    probability: float = 1.0
    """Probability that a micro-batch is mixed."""
    switch_probability: float = 0.5
    """Probability of cutmix where both are on."""
    label_smoothing: float = 0.1
    """Share of the label that is spread over all classes."""

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed at all."""
        return self.mixup > 0 or self.cutmix > 0

    def validate(self, micro_batch: int) -> None:
        """Raises `Refused` for values that cannot be, or that a micro-batch of so many samples cannot be mixed with."""
        for name in ("probability", "switch_probability", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise Refused(f"mixing.{name}: {getattr(self, name)} must lie between 0 and 1")
        if self.mixup < 0 or self.cutmix < 0:
            raise Refused("mixing.mixup, mixing.cutmix: must not be negative")
        if self.mixes and micro_batch % 2:  # else the sample in the middle is mixed with itself
            raise Refused(
                f"data.micro_batch: mixup pairs a micro-batch's samples, and {micro_batch} is odd; use an even one"
            )


@dataclasses.dataclass(frozen=True)
class ViewsConfig:
    """Multi-view testing: the logits of all views of a video are averaged."""

    temporal: int = 1
    """Time windows spread evenly over a video; with data.clip.sampling segments, even shifts within its segments."""
    spatial: int = 1
    """Square crops spread evenly along the longer side."""

    def validate(self) -> None:
        """Raises `Refused` for numbers below 1."""
        if self.temporal < 1 or self.spatial < 1:
            raise Refused("views.temporal, views.spatial: must be at least 1")

    def refuse_crops(self, why: str) -> None:
        """Raises `Refused` for crops of packed clips, which show the whole frame; `why` tells who packs them."""
        if self.spatial > 1:
            raise Refused(f"views.spatial: {self.spatial} crops, but {why} shows whole frames; use 1")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """A finetuning run."""

    out: str = "runs/finetune"
    """Folder of the run."""
    encoder: str | None = None
    """Pretraining run, or encoder folder, to start from; None trains from scratch."""
    architecture: EncoderConfig | None = None
    """The encoder's architecture: needed from scratch, and checked where an encoder is given."""
    freeze: int | Literal["encoder"] | None = None
    """Lowest layers that stay as pretrained: 1 is the embedding, N + 1 it and N blocks; encoder is all of it."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Low-rank adapters in the layers that freeze leaves; all else that was pretrained stays as it is."""
    drop_path: float = 0.1
    """Probability that a clip skips the last block's branches in training."""
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    """What stands on the encoder."""
    mixing: MixingConfig = dataclasses.field(default_factory=MixingConfig)
    """Mixup, cutmix, label smoothing."""
    ema: AverageConfig = dataclasses.field(default_factory=AverageConfig)
    """Moving average of the weights, which validation, evaluation and the exported model then have."""
    validation: ValidationConfig = dataclasses.field(default_factory=lambda: ValidationConfig(samples=1_000_000))
    """Accuracy on held-out samples."""
    views: ViewsConfig = dataclasses.field(default_factory=ViewsConfig)
    """Views of each held-out video in the final evaluation."""

    def source(self) -> str | EncoderConfig:
        """Returns the pretrained encoder to start from, or the architecture to train from scratch."""
        source = self.architecture if self.encoder is None else self.encoder
        if source is None:
            raise Refused("encoder: is missing; give a pretraining run, or an architecture to train from scratch")
        return source

    def validate(self) -> None:
        """Raises `Refused` for whatever is wrong, before anything is allocated."""
        self.validate_run()
        if self.data.mixture is not None:
            raise Refused("data.mixture: is for pretraining; finetuning reads one labelled set, give data.shards")
        self.head.validate()
        self.mixing.validate(self.data.micro_batch)
        self.views.validate()
        self.ema.validate()
        if self.ema.decay is not None and self.deepspeed_file:
            refuse_divided_weights(self.deepspeed_file, "ema.decay")
        self.source()
        self._validate_frozen()
        self._validate_adapters()
        if self.architecture is not None and self.architecture.drop_path:
            raise Refused("architecture.drop_path: is not read in finetuning; give drop_path instead")
        if self.data.packing is not None:
            self._validate_packed()
        if not 0 <= self.drop_path < 1:
            raise Refused(f"drop_path: {self.drop_path} must be at least 0 and less than 1")

    def _validate_frozen(self) -> None:
        if self.freeze is None:
            return
        if self.encoder is None:
            raise Refused("freeze: is for a pretrained encoder; leave it out to train from scratch, or give encoder")
        if self.freeze != "encoder" and self.freeze < 1:
            raise Refused(f"freeze: {self.freeze} must be at least 1, or encoder; leave it out to train all layers")

    def _validate_adapters(self) -> None:
        self.lora.validate()
        if self.lora.rank is not None and self.encoder is None:
            raise Refused("lora.rank: is for a pretrained encoder; leave it out to train from scratch, or give encoder")
        if self.lora.rank is not None and self.freeze == "encoder":
            raise Refused(
                "freeze, lora.rank: no layer is left for adapters where the encoder is frozen; give one of them, or a "
                "number of layers to freeze"
            )

    def _validate_packed(self) -> None:
        if self.head.pool != "mean":
            raise Refused(
                f"head.pool: {self.head.pool} is for clips one by one, not for those of data.packing; use mean"
            )
        if self.mixing.mixes:
            raise Refused(
                "mixing.mixup, mixing.cutmix: mix clips of one size, which those of data.packing are not; set both to 0"
            )
        self.views.refuse_crops("data.packing")
