"""Evaluation: every video of a set exactly once, whatever the number of processes; the logits of its views averaged.

The figures are computed in `figures.py`; what is written of them, and their page, is in `evaluation_page.py`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.classifier import ModelDescription, load
from finetune.config import ViewsConfig
from finetune.evaluation_page import curves_of, write_evaluation
from finetune.figures import Evaluation, VideoLogits, figures_of
from finetune.hardest import Cutter, hardest_videos
from finetune.multi_label import THRESHOLD, LabelsEvaluation, ScoredVideo, evaluate_labels
from finetune.output import make_writable
from pretrain.commandline import met_by_every_rank
from pretrain.data.decode_client import DECODE_LIMIT_S, refuse_decode_limit
from pretrain.data.order import evaluation_groups
from pretrain.data.packed_views import PackedEvaluationViews, PackedViews
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.shards import ShardSet
from pretrain.data.video import DecoderName
from pretrain.data.views import EvaluationViews, Views, evaluation_batches
from pretrain.engine.distributed import Processes
from pretrain.errors import Refused
from pretrain.packing import joined, visible_tokens
from pretrain.sets import open_shards

CLIPS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """An evaluation."""

    model: str
    """Model folder or finetuning run."""
    shards: str
    """Folder of labelled shards, or its URL."""
    split: str | None = None
    """Split to evaluate on: a name that `tubelet pack --split all` noted, such as test1, or a file with one key a line,
    such as split/validation.txt of a run; None takes all samples."""
    out: str | None = None
    """Folder for evaluation.json, predictions.jsonl and report.html; by default `evaluation` in the model's."""
    views: ViewsConfig = dataclasses.field(default_factory=ViewsConfig)
    """Views of each video."""
    threshold: float = THRESHOLD
    """Least score of a class that counts as predicted, on a multi-label set."""
    micro_batch: int | None = None
    """Videos that one process sends through the model at once; by default as many as have 16 views together."""
    decoder: DecoderName = "auto"
    """Who decodes: pyav, decord, torchcodec, or auto: pyav, which is exact on every file and quicker than decord."""
    decode_limit_s: float | None = DECODE_LIMIT_S
    """Seconds after which a decode is given up as an error; 0 or null decodes without limit or protection."""
    workers: int = 2
    """Loader processes for each process."""
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    """Where shards from a URL are kept."""

    def validate(self) -> None:
        """Raises `Refused` for numbers that cannot be."""
        self.views.validate()
        self.cache.validate("cache")
        if (self.micro_batch is not None and self.micro_batch < 1) or self.workers < 0:
            raise Refused("micro_batch, workers: must be at least 1 and 0")
        if not 0 < self.threshold < 1:
            raise Refused(f"threshold: {self.threshold} must lie between 0 and 1")
        refuse_decode_limit("decode_limit_s", self.decode_limit_s)


def evaluate(config: EvaluateConfig) -> Evaluation | LabelsEvaluation:
    """Evaluates a model folder on a set and writes what it found to a folder of its own.

    Raises:
        Refused: The model or the shards cannot be read, their classes differ, or the folder cannot be written.
        StoppedByRule: The model returns logits that are not finite.
        DiskFull: There is no space left for what was found.
    """
    with met_by_every_rank():
        config.validate()
    model, description = load(config.model)
    if description.packing:
        config.views.refuse_crops(f"{config.model} was trained on packed clips, of which each")
    shards = open_shards("shards", config.shards, description.clip, config.cache, config.split)
    check_classes(shards, description.classes, description.multi_label)
    out = Path(config.out) if config.out else Path(config.model) / "evaluation"
    cutter = cutter_of(shards, description, config.views, config.decoder, config.decode_limit_s)
    with Processes() as processes:
        processes.on_main_only(lambda: make_writable(out))
        evaluation = evaluate_on(
            model.to(processes.device),
            cutter,
            np.arange(shards.samples),
            description.classes,
            processes,
            config.micro_batch or samples_at_once(config.views),
            config.workers,
            config.threshold,
        )
        record = {"model": config.model} | circumstances(shards, config.views)
        processes.on_main_only(
            lambda: write_evaluation(
                out,
                evaluation,
                description.classes,
                record,
                hardest_videos(evaluation, cutter) if isinstance(evaluation, Evaluation) else (),
                curves_of(config.model),
            )
        )
    return evaluation


def check_training_labels(shards: ShardSet) -> None:
    """Raises `Refused` unless a classifier can learn from the set's labels."""
    _greatest_label(shards)
    if len(shards.classes) < 2:
        raise Refused(f"{shards.folder}: a classifier needs two classes or more; pack more class folders")


def check_classes(shards: ShardSet, classes: tuple[str, ...], multi_label: bool = False) -> None:
    """Raises `Refused` unless the set's labels are the model's classes, one a sample or any number as for the model."""
    if shards.labelled and shards.multi_label != multi_label:
        kinds = ("any number of labels", "one label") if shards.multi_label else ("one label", "any number of labels")
        raise Refused(
            f"{shards.folder}: its samples have {kinds[0]}, and the model was trained for {kinds[1]}; give a set with "
            f"{kinds[1]} a sample"
        )
    greatest = _greatest_label(shards)
    if greatest >= len(classes):
        raise Refused(
            f"{shards.folder}: has label {greatest}, but the model knows the classes 0 to {len(classes) - 1}; "
            f"give a set with the same classes"
        )
    if shards.classes[: len(classes)] != classes[: len(shards.classes)]:
        raise Refused(
            f"{shards.folder}: its classes {', '.join(shards.classes[:3])} ... are not the model's "
            f"{', '.join(classes[:3])} ...; pack it with the same --classes"
        )


def _greatest_label(shards: ShardSet) -> int:
    if not shards.labelled:
        raise Refused(f"{shards.folder}: has no labels; pack it from class folders or with --list")
    return max((label for labels in shards.label_lists() for label in labels), default=0)


def circumstances(shards: ShardSet, views: ViewsConfig) -> dict[str, Any]:
    """Returns what `evaluation.json` notes beside the figures: the videos and the views they were found on."""
    told = {"shards": str(shards.folder), "split": shards.split, "fingerprint": shards.fingerprint}
    return told | {"views": dataclasses.asdict(views)}


def samples_at_once(views: ViewsConfig) -> int:
    """Returns how many videos go through a model at once: about `CLIPS_AT_ONCE` clips, in any world."""
    return max(CLIPS_AT_ONCE // (views.temporal * views.spatial), 1)


def cutter_of(
    shards: ShardSet,
    description: ModelDescription,
    views: ViewsConfig,
    decoder: DecoderName = "auto",
    decode_limit_s: float | None = DECODE_LIMIT_S,
) -> Cutter:
    """Returns what cuts the views of a set's videos as a model wants to see them.

    Args:
        shards: The videos.
        description: The model, which tells the clips; a model of packed clips sees each alone.
        views: Views of each video.
        decoder: Who decodes.
        decode_limit_s: Seconds that a decode may take; None or 0 decodes without limit or protection.
    """
    if description.packed is not None:
        return PackedEvaluationViews(shards, description.packed, views.temporal, decoder, decode_limit_s)
    return EvaluationViews(shards, description.clip, views.temporal, views.spatial, decoder, decode_limit_s)


def evaluate_on(
    model: nn.Module,
    cutter: Cutter,
    chosen: np.ndarray,
    classes: tuple[str, ...],
    processes: Processes,
    micro_batch: int,
    workers: int,
    threshold: float = THRESHOLD,
) -> Evaluation | LabelsEvaluation:
    """Evaluates a model on labelled videos; every rank calls it and gets the same result.

    Args:
        model: Returns logits for clips.
        cutter: Cuts the views of labelled videos.
        chosen: The numbers of the samples to evaluate on.
        classes: Names of the classes.
        processes: All processes.
        micro_batch: Videos that go through the model at once.
        workers: Loader processes.
        threshold: Least score of a class that counts as predicted, on a multi-label set.

    Raises:
        StoppedByRule: The model returns logits that are not finite.
    """
    seen = logits_on(model, cutter, chosen, processes, micro_batch, workers)
    if cutter.shards.multi_label:
        scored = [ScoredVideo(one.key, one.label, one.logits, one.error) for one in seen]
        return evaluate_labels(scored, classes, threshold)
    return figures_of(seen, classes)


@torch.no_grad()
def logits_on(
    model: nn.Module, cutter: Cutter, chosen: np.ndarray, processes: Processes, micro_batch: int, workers: int
) -> list[VideoLogits]:
    """Returns what a model makes of each video in the order of sample numbers, on every rank; see `evaluate_on`.

    The same videos meet in a forward pass however many processes share them, so that not a bit of a logit differs.
    """
    places, counted = evaluation_groups(len(chosen), micro_batch, processes.world, processes.rank)
    was_training = model.training
    model.eval()
    own: list[VideoLogits] = []
    for group in evaluation_batches(cutter, chosen[places], counted, micro_batch, workers):
        logits = logits_of(model, group, processes.device).unflatten(0, (len(group), -1)).mean(1).cpu().numpy()
        own += [
            VideoLogits(one.sample, one.key, one.label, None if one.error else row, one.error)
            for one, row in zip(group, logits, strict=True)
            if one.counted
        ]
    model.train(was_training)
    seen = [one for part in processes.gather_objects(own) for one in part]
    return sorted(seen, key=lambda one: one.sample)


def logits_of(model: nn.Module, group: list[Views] | list[PackedViews], device: torch.device) -> Tensor:
    """Returns the logits `(views of all samples, classes)` in full precision."""
    if isinstance(group[0], PackedViews):
        sequences = joined([one.sequences for one in group if isinstance(one, PackedViews)], device)
        return model(visible_tokens(sequences)).float().squeeze(1)
    clips = torch.cat([one.clips for one in group if isinstance(one, Views)])
    return model(clips.to(device)).float()
