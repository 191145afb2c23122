"""Evaluation: every video of a set exactly once, whatever the number of processes; the logits of its views averaged."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from finetune.classifier import load
from finetune.config import ViewsConfig
from pretrain.data.clips import ClipConfig
from pretrain.data.loader import EvaluationViews, evaluation_batches
from pretrain.data.order import evaluation_slice
from pretrain.data.shards import ShardSet
from pretrain.engine.distributed import Processes
from pretrain.errors import Refused
from pretrain.files import write_json, write_text
from pretrain.report import Figure, Section, Table, confusion_matrix, write_report


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """An evaluation."""

    model: str
    """Model folder or finetuning run."""
    shards: str
    """Folder of labelled shards."""
    out: str | None = None
    """Folder for evaluation.json, predictions.jsonl and report.html; by default `evaluation` in the model's."""
    views: ViewsConfig = dataclasses.field(default_factory=ViewsConfig)
    """Views of each video."""
    batch: int = 8
    """Videos that one process sends through the model at once."""
    workers: int = 2
    """Loader processes for each process."""

    def validate(self) -> None:
        """Raises `Refused` for numbers that cannot be."""
        self.views.validate()
        if self.batch < 1 or self.workers < 0:
            raise Refused("batch, workers: must be at least 1 and 0")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        figures: `top1`, `top5`, `mean_class_accuracy` as shares, `samples`, and `errors`, the videos that could not be
            decoded, which count as wrong.
        confusion: `(K, K)` counts of the decoded videos; rows are true classes.
        predictions: For each video its key, label, the predicted class and its probability, or why there is none.
    """

    figures: dict[str, Any]
    confusion: np.ndarray
    predictions: list[dict[str, Any]]


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluates a model folder on a set and writes what it found to a folder of its own.

    Raises:
        Refused: The model or the shards cannot be read, or their classes differ.
    """
    config.validate()
    model, description = load(config.model)
    shards = ShardSet.open(config.shards)
    check_labels(shards, description.classes)
    with Processes() as processes:
        evaluation = evaluate_on(
            model.to(processes.device),
            shards,
            description.clip,
            description.classes,
            config.views,
            processes,
            config.batch,
            config.workers,
        )
        if processes.is_main:
            out = Path(config.out) if config.out else Path(config.model) / "evaluation"
            write_evaluation(out, evaluation, description.classes, config.shards)
    return evaluation


def check_labels(shards: ShardSet, classes: tuple[str, ...]) -> None:
    """Raises `Refused` unless the set's labels are the model's classes."""
    if not shards.labelled:
        raise Refused(f"{shards.folder}: has no labels; pack it from class folders or with --list")
    labels = shards.labels()
    if max(labels) >= len(classes):
        raise Refused(
            f"{shards.folder}: has label {max(labels)}, but the model knows the classes 0 to {len(classes) - 1}; "
            f"evaluate on a set with the same classes"
        )
    if len(classes) < 2:
        raise Refused(f"{shards.folder}: a classifier needs two classes or more; pack more class folders")
    if shards.classes[: len(classes)] != classes[: len(shards.classes)]:
        raise Refused(
            f"{shards.folder}: its classes {', '.join(shards.classes[:3])} ... are not the model's "
            f"{', '.join(classes[:3])} ...; pack it with the same --classes"
        )


def evaluate_on(
    model: nn.Module,
    shards: ShardSet,
    clip: ClipConfig,
    classes: tuple[str, ...],
    views: ViewsConfig,
    processes: Processes,
    batch: int,
    workers: int,
    samples: int | None = None,
) -> Evaluation:
    """Evaluates a model on labelled shards; every rank calls it and gets the same result.

    Args:
        model: Returns logits for clips.
        shards: Labelled videos.
        clip: The clips that the model sees.
        classes: Names of the classes.
        views: Views of each video.
        processes: All processes.
        batch: Videos that go through the model at once.
        workers: Loader processes.
        samples: Use at most this many videos, spread evenly over the set.
    """
    chosen = np.linspace(0, shards.samples - 1, min(samples or shards.samples, shards.samples)).astype(np.int64)
    numbers, counted = evaluation_slice(len(chosen), processes.world, processes.rank)
    cutter = EvaluationViews(shards, clip, views.temporal, views.spatial)
    was_training = model.training
    model.eval()
    own: list[tuple[str, int, np.ndarray | None, str | None]] = []
    with torch.no_grad():
        for group in evaluation_batches(cutter, chosen[numbers], counted, batch, workers):
            clips = torch.cat([one.clips for one in group]).to(processes.device)
            logits = model(clips).float().unflatten(0, (len(group), -1)).mean(1).cpu().numpy()
            own += [
                (one.key, one.label, None if one.error else row, one.error)
                for one, row in zip(group, logits, strict=True)
                if one.counted
            ]
    model.train(was_training)
    return figures_of([one for part in processes.gather_objects(own) for one in part], classes)


def figures_of(results: list[tuple[str, int, np.ndarray | None, str | None]], classes: tuple[str, ...]) -> Evaluation:
    """Computes the figures from (key, label, logits or None, error or None) of each video."""
    decoded = [one for one in results if one[2] is not None]
    errors = len(results) - len(decoded)
    predictions: list[dict[str, Any]] = [
        {"key": key, "label": classes[label], "error": error} for key, label, logits, error in results if error
    ]
    if not decoded:
        figures = {"top1": 0.0, "top5": 0.0, "mean_class_accuracy": 0.0, "samples": len(results), "errors": errors}
        return Evaluation(figures, np.zeros((len(classes),) * 2, dtype=np.int64), predictions)
    logits = torch.from_numpy(np.stack([one[2] for one in decoded]))
    labels = torch.tensor([one[1] for one in decoded])
    share = len(decoded) / len(results)
    top = min(5, len(classes))
    count = len(classes)
    accuracy = {
        "top1": multiclass_accuracy(logits, labels, count, average="micro").item() * share,
        "top5": multiclass_accuracy(logits, labels, count, average="micro", top_k=top).item() * share,
    }
    probabilities = logits.softmax(1)
    for (key, label, _, _), row in zip(decoded, probabilities, strict=True):
        best = int(row.argmax())
        predictions.append(
            {"key": key, "label": classes[label], "predicted": classes[best], "probability": round(float(row[best]), 4)}
        )
    confusion = multiclass_confusion_matrix(logits.argmax(1), labels, count).numpy()
    videos = np.bincount([label for _, label, _, _ in results], minlength=count)  # with those that cannot be decoded
    accuracy["mean_class_accuracy"] = float((confusion.diagonal()[videos > 0] / videos[videos > 0]).mean())
    return Evaluation(accuracy | {"samples": len(results), "errors": errors}, confusion, predictions)


def write_evaluation(out: Path, evaluation: Evaluation, classes: tuple[str, ...], shards: str) -> None:
    """Writes `evaluation.json`, `predictions.jsonl` and `report.html`."""
    import json

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "evaluation.json", evaluation.figures)
    write_text(out / "predictions.jsonl", "".join(json.dumps(one) + "\n" for one in evaluation.predictions))
    figures = evaluation.figures
    write_report(
        out / "report.html",
        title=f"Evaluation on {Path(shards).name}",
        summary=f"{figures['samples']} videos, {figures['errors']} of them not decodable.",
        headline=[(f"{100 * figures[name]:.1f} %", label) for name, label in HEADLINE],
        sections=evaluation_sections(evaluation, classes),
    )


HEADLINE = (("mean_class_accuracy", "mean class accuracy"), ("top5", "top-5 accuracy"), ("top1", "top-1 accuracy"))


def evaluation_sections(evaluation: Evaluation, classes: tuple[str, ...]) -> list[Section]:
    """Returns the confusion matrix and the accuracy of each class."""
    totals = evaluation.confusion.sum(1)
    rows = [
        (name, int(total), f"{100 * right / total:.1f} %" if total else "-")
        for name, total, right in zip(classes, totals, evaluation.confusion.diagonal(), strict=True)
    ]
    return [
        Section("Confusion", parts=[Figure(confusion_matrix(evaluation.confusion, classes), "Rows are true classes.")]),
        Section("Classes", parts=[Table(("class", "videos", "right"), rows)]),
    ]
