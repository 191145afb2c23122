"""The configuration of the data path: where samples are, how clips are cut from them, and who reads them."""

import dataclasses
import math
from typing import Literal

from pretrain.data.augmentation import AugmentConfig
from pretrain.data.clips import ClipConfig
from pretrain.data.decode_client import DECODE_LIMIT_S, refuse_decode_limit
from pretrain.data.quarantine import read_quarantine
from pretrain.data.sequence_plan import PackingConfig
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.video import DecoderName
from pretrain.errors import Refused


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the samples are and how they are read."""

    shards: str | None = None
    """Folder of shards, written by `tubelet pack`, or its http://, https:// or s3:// URL."""
    mixture: dict[str, float] | None = None
    """Several folders or URLs of shards in place of one, each with its weight: its share of every step."""
    split: str | None = None
    """Split of `shards` to train on: a name that `tubelet pack --split all` noted, such as train1, or a file with one
    key a line; None takes all samples."""
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    """Where shards from URLs are kept."""
    clip: ClipConfig = dataclasses.field(default_factory=ClipConfig)
    """How a clip is cut from a sample."""
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    """How a training clip is changed after it was cut."""
    packing: PackingConfig | None = None
    """Clips of any size packed into sequences (NaViT); None cuts all clips to one size."""
    repeats: int = 1
    """Clips cut from each sample, with other crops and masks (repeated augmentation)."""
    time_windows: Literal["shared", "own"] = "shared"
    """Whether the repeats of a sample show the same frames, or each those of a time window of its own."""
    global_batch: int = 256
    """Samples in one optimiser step over all processes."""
    micro_batch: int = 8
    """Samples that one process sends through the model at once; the rest is accumulated."""
    lanes: int = 8
    """Parts of the set that are read side by side; divides global_batch. A multiple of the nodes keeps caches warm."""
    shards_per_window: int = 8
    """Pieces of shards that are shuffled together."""
    class_power: float = 1.0
    """Class balance: a class's share of every step grows with its samples to this power; 1 as stored, 0 all alike."""
    decoder: DecoderName = "auto"
    """Who decodes: pyav, decord, torchcodec, or auto: pyav, which is exact on every file and quicker than decord."""
    decode_limit_s: float | None = DECODE_LIMIT_S
    """Seconds after which a decode is given up as a bad sample; 0 or null decodes without limit or protection."""
    workers: int = 4
    """Loader processes for each training process; 0 loads in the training process."""
    max_bad_share: float = 0.01
    """Stop the run when more than this share of the samples read cannot be decoded; the first ten are forgiven."""
    quarantine: str | None = None
    """Samples that training passes over unread: the skipped.jsonl of a run, or lines like {"key": "..."}."""

    def validate(self) -> None:
        """Raises `Refused` for numbers and files that cannot be; the order checks what must divide."""
        for name in ("repeats", "global_batch", "micro_batch", "lanes", "shards_per_window"):
            if getattr(self, name) < 1:
                raise Refused(f"data.{name}: {getattr(self, name)} must be at least 1")
        if self.mixture is not None and not self.mixture:
            raise Refused("data.mixture: holds no set; give folders of shards with their weights")
        for folder, weight in (self.mixture or {}).items():
            if not 0 < weight < math.inf:
                raise Refused(f"data.mixture: the weight {weight} of {folder} must be finite and greater than 0")
        if self.split is not None and self.mixture is not None:
            raise Refused(f"data.split: {self.split} is a split of data.shards, and data.mixture names several sets")
        if not 0 <= self.class_power <= 1:
            raise Refused(f"data.class_power: {self.class_power} must lie between 0 (all alike) and 1 (as stored)")
        if self.class_power < 1 and self.mixture is not None:
            raise Refused(
                f"data.class_power: {self.class_power} balances the classes of one labelled set, and data.mixture "
                f"names several sets; leave it at 1"
            )
        if self.workers < 0:
            raise Refused(f"data.workers: {self.workers} must not be negative")
        if not 0 <= self.max_bad_share <= 1:
            raise Refused(f"data.max_bad_share: {self.max_bad_share} must lie between 0 and 1")
        self.augment.validate()
        if self.packing is not None:
            self.packing.validate(self.micro_batch)
        self.cache.validate()
        refuse_decode_limit("data.decode_limit_s", self.decode_limit_s)
        read_quarantine(self.quarantine)
