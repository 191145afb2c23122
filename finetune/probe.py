"""Probes of frozen features: what an encoder is worth before anything of it is finetuned (`tubelet probe`).

k-NN trains nothing, the linear probe a linear layer on mean-pooled features, the attentive probe a query and a linear
layer on tokens. Whatever a probe chooses, it chooses on training videos.
"""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from finetune.attentive_probe import attentive_logits
from finetune.config import ViewsConfig
from finetune.evaluate import circumstances
from finetune.evaluation_page import percent, write_evaluation
from finetune.features import FeatureKind, FrozenEncoder, KeptFeatures, Reading, open_encoder
from finetune.figures import Evaluation, VideoLogits, figures_of, telling_accuracies
from finetune.linear_probe import linear_logits
from finetune.output import make_writable
from pretrain.commandline import met_by_every_rank, to_yaml
from pretrain.data.decode_client import DECODE_LIMIT_S, refuse_decode_limit
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.shards import ShardSet
from pretrain.data.subset import common_samples
from pretrain.data.video import DecoderName
from pretrain.engine.distributed import Processes
from pretrain.errors import Refused
from pretrain.features import VideoFeatures
from pretrain.files import write_json, write_text
from pretrain.labelled import listed, open_labelled, refuse_other_classes, videos_by_class
from pretrain.neighbours import knn_shares

logger = logging.getLogger(__name__)

Kind = Literal["knn", "linear", "attentive"]
KINDS: tuple[Kind, ...] = ("knn", "linear", "attentive")
LEAST_SHARE = 1e-8
"""Share of the votes of a class that gets none."""


@dataclasses.dataclass(frozen=True)
class EncoderProbeConfig:
    """Probes of an encoder."""

    encoder: str
    """Pretraining run, or encoder folder; of a classifier its encoder is probed."""
    train: str
    """Folder of labelled shards that the probes learn from, or its URL."""
    test: str
    """Folder of labelled shards that they are tested on, or its URL."""
    train_split: str | None = None
    """Split of `train`: a name that `tubelet pack --split all` noted, or a file with one key a line; None is all."""
    test_split: str | None = None
    """Split of `test`, likewise."""
    kind: Literal["knn", "linear", "attentive", "all"] = "all"
    """Which probe."""
    untrained: bool = False
    """Probe fresh weights of the same architecture, as a baseline."""
    out: str | None = None
    """Folder for the results; by default `probe` in the encoder's run, or `probe_untrained`."""
    features: str | None = None
    """Folder in which features are kept for the next call; by default `features` in the encoder's run."""
    seed: int = 0
    """Seed of what is held out of the training videos, of the attentive probe, and of fresh weights."""
    views: ViewsConfig = dataclasses.field(default_factory=ViewsConfig)
    """Views of each video; each view of a training video is a sample, and logits of a test video's are averaged."""
    tokens_limit_gib: float = 16
    """Size that the kept tokens, which only the attentive probe needs, may have; they have to fit in memory too."""
    micro_batch: int = 16
    """Videos that one process sends through the encoder at once."""
    workers: int = 2
    """Loader processes for each process."""
    decoder: DecoderName = "auto"
    """Who decodes: pyav, decord, torchcodec, or auto: pyav, which is exact on every file and quicker than decord."""
    decode_limit_s: float | None = DECODE_LIMIT_S
    """Seconds after which a decode is given up as an error; 0 or null decodes without limit or protection."""
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    """Where shards from a URL are kept."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The probes that are made."""
        return KINDS if self.kind == "all" else (self.kind,)

    @property
    def out_folder(self) -> Path:
        """Where the results go."""
        return Path(self.out) if self.out else Path(self.encoder) / ("probe_untrained" if self.untrained else "probe")

    @property
    def features_folder(self) -> Path:
        """Where features are kept."""
        return Path(self.features) if self.features else Path(self.encoder) / "features"

    def validate(self) -> None:
        """Raises `Refused` for numbers that cannot be."""
        self.views.validate()
        self.cache.validate("cache")
        if self.micro_batch < 1 or self.workers < 0:
            raise Refused("micro_batch, workers: must be at least 1 and 0")
        if not 0 <= self.seed < 1 << 63:
            raise Refused(f"seed: {self.seed} must be at least 0 and less than 2 ** 63")
        if not self.tokens_limit_gib > 0:
            raise Refused(f"tokens_limit_gib: {self.tokens_limit_gib} must be greater than 0")
        refuse_decode_limit("decode_limit_s", self.decode_limit_s)


class Probed(NamedTuple):
    """What a probe found.

    Attributes:
        evaluation: Its figures on the test videos.
        chosen: What it chose on the training videos.
    """

    evaluation: Evaluation
    chosen: dict[str, float]


def probe(config: EncoderProbeConfig) -> dict[Kind, Probed]:
    """Probes an encoder, and writes what an evaluation writes, and its configuration, to a folder for each probe.

    Every rank calls it; all share the computing of features, and rank 0 does the rest.

    Returns:
        What each probe found, on rank 0; nothing on the others.

    Raises:
        Refused: The encoder or a set cannot be read, the sets' classes differ, or a folder cannot be written.
        StoppedByRule: The encoder returns features that are not finite.
        DiskFull: There is no space left.
    """
    with met_by_every_rank():
        config.validate()
    frozen = open_encoder(config.encoder, config.untrained, config.seed)
    train, test = open_sets_of_probe(config, frozen)
    kept: dict[FeatureKind, list[KeptFeatures]] = {
        kind: [KeptFeatures(config.features_folder, frozen, one, config.views, kind) for one in (train, test)]
        for kind in get_args(FeatureKind)
    }
    if "attentive" in config.kinds:
        refuse_large_tokens(config, kept["tokens"])
    reading = Reading(config.micro_batch, config.workers, config.decoder, config.decode_limit_s)
    found: dict[Kind, Probed] = {}
    with Processes() as processes:
        for kind in config.kinds:
            processes.on_main_only(functools.partial(make_writable, config.out_folder / kind))
        features: dict[FeatureKind, list[VideoFeatures | None]] = {}
        for kind in config.kinds:
            needed = needed_by(kind)
            if needed not in features:
                features = {needed: [one.read_or_compute(processes, reading) for one in kept[needed]]}
            known, asked = features[needed]
            fit = functools.partial(fit_and_write, config, kind, frozen, train, test, known, asked, processes.device)
            result = processes.on_main_patiently(fit)
            if result is not None:
                found[kind] = result
        summary = {kind: one.evaluation.figures | one.chosen for kind, one in found.items()}
        processes.on_main_only(lambda: write_json(config.out_folder / "summary.json", summary))
    return found


def open_sets_of_probe(config: EncoderProbeConfig, frozen: FrozenEncoder) -> tuple[ShardSet, ShardSet]:
    """Opens the training and the test set; raises `Refused` where nothing can be learned from them."""
    train = open_labelled("train", config.train, frozen.clip, config.cache, least=2, split=config.train_split)
    test = open_labelled("test", config.test, frozen.clip, config.cache, split=config.test_split)
    refuse_other_classes("test", test, "train", train)
    counts = videos_by_class(train)
    if (counts > 0).sum() < 2:
        raise Refused(f"train: {train.folder} has videos of one class; give a set of two classes or more")
    single = [name for name, count in zip(train.classes, counts, strict=True) if count == 1]
    if single:
        logger.warning(
            "train: %s: one video each in %s, so that none is held out to choose by; add videos",
            listed(single),
            train.folder,
        )
    both = common_samples(train, test)
    if both:
        logger.warning(
            "test: %d of its %d videos are in train too, so the figures tell what was learned by heart; give others",
            both,
            test.samples,
        )
    return train, test


def refuse_large_tokens(config: EncoderProbeConfig, kept: list[KeptFeatures]) -> None:
    """Raises `Refused` where the tokens of both sets would take more than they may."""
    size_gib = sum(one.size_gib for one in kept)
    if size_gib > config.tokens_limit_gib:
        raise Refused(
            f"tokens_limit_gib: the attentive probe's tokens take {size_gib:.1f} GiB on the disk and in memory, more "
            f"than {config.tokens_limit_gib:g}; raise it, take smaller sets or fewer views, or give --kind linear"
        )


def needed_by(kind: Kind) -> FeatureKind:
    """Returns what a probe reads."""
    return "tokens" if kind == "attentive" else "mean"


def fit_and_write(
    config: EncoderProbeConfig,
    kind: Kind,
    frozen: FrozenEncoder,
    train: ShardSet,
    test: ShardSet,
    known: VideoFeatures | None,
    asked: VideoFeatures | None,
    device: torch.device,
) -> Probed:
    """Fits one probe, tests it, and writes what it found; on rank 0, which has the features of both sets."""
    assert known, "rank 0 has read them"
    assert asked, "rank 0 has read them"
    classes = test.classes
    learned, decoded = known.decoded(), asked.decoded()
    broken = len(known.keys) - len(learned.keys)
    if broken:
        logger.warning("train: %d videos of %s cannot be decoded and are left out", broken, train.folder)
    if len(learned.keys) < 2:
        raise Refused(f"train: no two videos of {train.folder} can be decoded; pack them anew")
    logits, chosen = logits_of_probe(kind, learned, decoded, len(classes), frozen, config.seed, device)
    rows = iter(logits.mean(1).numpy())
    seen = [
        VideoLogits(sample, key, int(label), None if error else next(rows), error)
        for sample, (key, label, error) in enumerate(zip(asked.keys, asked.labels, asked.errors, strict=True))
    ]
    evaluation = figures_of(seen, classes)
    record: dict[str, Any] = {
        "model": config.encoder,
        "probe": kind,
        "untrained": config.untrained,
        "encoder_sha256": frozen.sha256,
        "train": str(train.folder),
        "train_split": train.split,
        "train_fingerprint": train.fingerprint,
        "seed": config.seed,
        **chosen,
    }
    out = config.out_folder / kind
    write_evaluation(out, evaluation, classes, record | circumstances(test, config.views))
    write_text(out / "config.yaml", to_yaml(dataclasses.replace(config, kind=kind)))
    return Probed(evaluation, chosen)


def logits_of_probe(
    kind: Kind,
    train: VideoFeatures,
    test: VideoFeatures,
    classes: int,
    frozen: FrozenEncoder,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, dict[str, float]]:
    """Returns the logits `(m, views, K)` of test videos, and what the probe chose on training videos."""
    if not test.keys:
        return torch.zeros(0, 1, classes), {}
    if kind == "linear":
        return linear_logits(train, test, classes, seed)
    if kind == "attentive":
        return attentive_logits(train, test, classes, frozen.encoder.config.sizes().heads, seed, device)
    known, labels = train.by_view()
    shares = knn_shares(known, labels, test.values.flatten(0, 1), classes)
    return shares.clamp_min(LEAST_SHARE).log().unflatten(0, (-1, test.values.shape[1])), {}


def show(config: EncoderProbeConfig, found: dict[Kind, Probed], console: Console) -> None:
    """Prints what the probes found as a small table."""
    title = f"{config.encoder}{' with fresh weights' if config.untrained else ''}, tested on {config.test}"
    accuracies = telling_accuracies(max(one.evaluation.figures["classes"] for one in found.values()))
    table = Table("probe", *accuracies.values(), "chosen", title=title, title_justify="left")
    for kind, (evaluation, chosen) in found.items():
        shares = [percent(evaluation.figures[name]) for name in accuracies]
        table.add_row(kind, *shares, ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in chosen.items()))
    console.print(table)
