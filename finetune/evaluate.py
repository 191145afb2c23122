"""Evaluation: every video of a set exactly once, whatever the number of processes; the logits of its views averaged."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from finetune.classifier import load
from finetune.config import ViewsConfig
from pretrain.commandline import met_by_every_rank
from pretrain.data.clips import ClipConfig
from pretrain.data.decode_client import DECODE_LIMIT_S, refuse_decode_limit
from pretrain.data.order import evaluation_slice
from pretrain.data.packed_views import PackedEvaluationViews, PackedViews
from pretrain.data.sequence_plan import Packing
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.shards import ShardSet
from pretrain.data.video import DecoderName
from pretrain.data.views import EvaluationViews, Views, evaluation_batches
from pretrain.engine.distributed import Processes
from pretrain.errors import DiskFull, Refused, StoppedByRule
from pretrain.files import is_out_of_space, write_json, write_text
from pretrain.packing import joined, visible_tokens
from pretrain.report import Figure, Section, Table, confusion_matrix, write_report
from pretrain.stage import open_shards


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
    micro_batch: int = 8
    """Videos that one process sends through the model at once."""
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
        if self.micro_batch < 1 or self.workers < 0:
            raise Refused("micro_batch, workers: must be at least 1 and 0")
        refuse_decode_limit("decode_limit_s", self.decode_limit_s)


class VideoLogits(NamedTuple):
    """What the model made of one video.

    Attributes:
        key: The video's key.
        label: The number of its class.
        logits: `(K,)`, the mean over its views; None where it cannot be decoded.
        error: Why it cannot be decoded, or None.
    """

    key: str
    label: int
    logits: np.ndarray | None
    error: str | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        figures: `top1`, `top5`, `mean_class_accuracy` as shares, `samples`, and `errors`, the videos that could not be
            decoded, which count as wrong.
        confusion: `(K, K)` counts of the decoded videos; rows are true classes.
        videos: `(K,)` counts of all videos of each class, those included that could not be decoded.
        predictions: For each video its key, label, the predicted class and its probability, or why there is none.
    """

    figures: dict[str, Any]
    confusion: np.ndarray
    videos: np.ndarray
    predictions: list[dict[str, Any]]


def evaluate(config: EvaluateConfig) -> Evaluation:
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
    check_classes(shards, description.classes)
    out = Path(config.out) if config.out else Path(config.model) / "evaluation"
    with Processes() as processes:
        processes.on_main_only(lambda: make_writable(out))
        evaluation = evaluate_on(
            model.to(processes.device),
            shards,
            np.arange(shards.samples),
            description.clip,
            description.classes,
            config.views,
            processes,
            config.micro_batch,
            config.workers,
            config.decoder,
            config.decode_limit_s,
            description.packed,
        )
        record = {"model": config.model} | circumstances(shards, config.views)
        processes.on_main_only(lambda: write_evaluation(out, evaluation, description.classes, record))
    return evaluation


def check_training_labels(shards: ShardSet) -> None:
    """Raises `Refused` unless a classifier can learn from the set's labels."""
    _greatest_label(shards)
    if len(shards.classes) < 2:
        raise Refused(f"{shards.folder}: a classifier needs two classes or more; pack more class folders")


def check_classes(shards: ShardSet, classes: tuple[str, ...]) -> None:
    """Raises `Refused` unless the set's labels are the model's classes."""
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
    return max(shards.labels())


@contextlib.contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Makes one line of what may go wrong when files are written to a folder."""
    try:
        yield
    except OSError as error:
        if is_out_of_space(error):
            raise DiskFull(f"{out}: no space left on the disk; free some or give another --out") from None
        raise Refused(f"{out}: cannot be written ({error.strerror}); give another --out") from None


def make_writable(out: Path) -> None:
    """Makes a folder and tries to write to it, so that no evaluation ends in a folder that takes no files."""
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(bytes(1 << 16))


def evaluate_on(
    model: nn.Module,
    shards: ShardSet,
    chosen: np.ndarray,
    clip: ClipConfig,
    classes: tuple[str, ...],
    views: ViewsConfig,
    processes: Processes,
    micro_batch: int,
    workers: int,
    decoder: DecoderName = "auto",
    decode_limit_s: float | None = DECODE_LIMIT_S,
    packing: Packing | None = None,
) -> Evaluation:
    """Evaluates a model on labelled shards; every rank calls it and gets the same result.

    Args:
        model: Returns logits for clips.
        shards: Labelled videos.
        chosen: The numbers of the samples to evaluate on.
        clip: The clips that the model sees.
        classes: Names of the classes.
        views: Views of each video.
        processes: All processes.
        micro_batch: Videos that go through the model at once.
        workers: Loader processes.
        decoder: Who decodes.
        decode_limit_s: Seconds that a decode may take; None or 0 decodes without limit or protection.
        packing: How clips are sized for a model of packed clips, which then sees each alone; else None.

    Raises:
        StoppedByRule: The model returns logits that are not finite.
    """
    numbers, counted = evaluation_slice(len(chosen), processes.world, processes.rank)
    cutter: Dataset = EvaluationViews(shards, clip, views.temporal, views.spatial, decoder, decode_limit_s)
    if packing is not None:
        cutter = PackedEvaluationViews(shards, packing, views.temporal, decoder, decode_limit_s)
    was_training = model.training
    model.eval()
    own: list[VideoLogits] = []
    with torch.no_grad():
        for group in evaluation_batches(cutter, chosen[numbers], counted, micro_batch, workers):
            logits = logits_of(model, group, processes.device).unflatten(0, (len(group), -1)).mean(1).cpu().numpy()
            own += [
                VideoLogits(one.key, one.label, None if one.error else row, one.error)
                for one, row in zip(group, logits, strict=True)
                if one.counted
            ]
    model.train(was_training)
    return figures_of([one for part in processes.gather_objects(own) for one in part], classes)


def logits_of(model: nn.Module, group: list[Views] | list[PackedViews], device: torch.device) -> Tensor:
    """Returns the logits `(views of all samples, classes)` in full precision."""
    if isinstance(group[0], PackedViews):
        sequences = joined([one.sequences for one in group if isinstance(one, PackedViews)], device)
        return model(visible_tokens(sequences)).float().squeeze(1)
    clips = torch.cat([one.clips for one in group if isinstance(one, Views)])
    return model(clips.to(device)).float()


def figures_of(seen: list[VideoLogits], classes: tuple[str, ...]) -> Evaluation:
    """Computes the figures from what the model made of all videos.

    Args:
        seen: The logits of every video, or why it has none.
        classes: Names of the classes.

    Raises:
        StoppedByRule: Logits are not finite, so that no class is the most probable.
    """
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix  # takes seconds

    decoded, rows = [], []
    for one in seen:
        if one.logits is not None:
            decoded.append(one)
            rows.append(one.logits)
    errors = len(seen) - len(decoded)
    count = len(classes)
    videos = np.bincount([one.label for one in seen], minlength=count)
    predictions: list[dict[str, Any]] = [
        {"key": one.key, "label": classes[one.label], "error": one.error} for one in seen if one.error
    ]
    if not decoded:
        figures = {"top1": 0.0, "top5": 0.0, "mean_class_accuracy": 0.0, "samples": len(seen), "errors": errors}
        return Evaluation(figures, np.zeros((count, count), dtype=np.int64), videos, predictions)
    logits = torch.from_numpy(np.stack(rows))
    _stop_if_not_finite(logits, decoded)
    labels = torch.tensor([one.label for one in decoded])
    share = len(decoded) / len(seen)
    accuracy = {
        "top1": multiclass_accuracy(logits, labels, count, average="micro").item() * share,
        "top5": multiclass_accuracy(logits, labels, count, average="micro", top_k=min(5, count)).item() * share,
    }
    for one, row in zip(decoded, logits.softmax(1), strict=True):
        best = int(row.argmax())
        found = {"predicted": classes[best], "probability": round(float(row[best]), 4)}
        predictions.append({"key": one.key, "label": classes[one.label]} | found)
    confusion = multiclass_confusion_matrix(logits.argmax(1), labels, count).numpy()
    accuracy["mean_class_accuracy"] = float((confusion.diagonal()[videos > 0] / videos[videos > 0]).mean())
    return Evaluation(accuracy | {"samples": len(seen), "errors": errors}, confusion, videos, predictions)


def _stop_if_not_finite(logits: Tensor, decoded: list[VideoLogits]) -> None:
    bad = (~logits.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise StoppedByRule(
            f"{decoded[bad[0]].key}: the model's logits are not finite ({len(bad)} of {len(decoded)} such videos); "
            f"finetune again with a lower optimizer.base_lr"
        )


def circumstances(shards: ShardSet, views: ViewsConfig) -> dict[str, Any]:
    """Returns what `evaluation.json` notes beside the figures: the videos and the views they were found on."""
    told = {"shards": str(shards.folder), "split": shards.split, "fingerprint": shards.fingerprint}
    return told | {"views": dataclasses.asdict(views)}


def write_evaluation(out: Path, evaluation: Evaluation, classes: tuple[str, ...], record: dict[str, Any]) -> None:
    """Writes `evaluation.json`, `predictions.jsonl` and `report.html`.

    Args:
        out: The folder, which exists.
        evaluation: What was found.
        classes: Names of the classes.
        record: What was evaluated on what, for `evaluation.json` and the page.

    Raises:
        Refused: The folder cannot be written.
        DiskFull: There is no space left.
    """
    figures = evaluation.figures
    with writing_to(out):
        write_json(out / "evaluation.json", figures | record)
        write_text(out / "predictions.jsonl", "".join(json.dumps(one) + "\n" for one in evaluation.predictions))
        write_report(
            out / "report.html",
            title=f"Evaluation on {Path(record['shards']).name}",
            summary=f"{figures['samples']} videos, {figures['errors']} of them not decodable.",
            headline=[(f"{100 * figures[name]:.1f} %", label) for name, label in HEADLINE],
            sections=evaluation_sections(evaluation, classes),
            facts=record,
        )


HEADLINE = (("mean_class_accuracy", "mean class accuracy"), ("top5", "top-5 accuracy"), ("top1", "top-1 accuracy"))


def evaluation_sections(evaluation: Evaluation, classes: tuple[str, ...]) -> list[Section]:
    """Returns the confusion matrix, and each class's accuracy over all of its videos."""
    rows = [
        (name, int(videos), f"{100 * right / videos:.1f} %" if videos else "-")
        for name, videos, right in zip(classes, evaluation.videos, evaluation.confusion.diagonal(), strict=True)
    ]
    return [
        Section("Confusion", parts=[Figure(confusion_matrix(evaluation.confusion, classes), "Rows are true classes.")]),
        Section("Classes", parts=[Table(("class", "videos", "right"), rows)]),
    ]
