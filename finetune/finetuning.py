"""Finetuning: a pretrained encoder with a class token and a head learns to classify clips."""

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from finetune.adapters import add_adapters, merge_adapters, merged
from finetune.classifier import Classifier, ModelDescription, save_classifier
from finetune.config import FinetuneConfig, LoraConfig, ViewsConfig
from finetune.evaluate import (
    check_classes,
    check_training_labels,
    circumstances,
    cutter_of,
    evaluate_on,
    samples_at_once,
)
from finetune.evaluation_page import evaluation_sections, headline, write_result
from finetune.figures import Evaluation
from finetune.freezing import freeze
from finetune.hardest import hardest_videos
from finetune.multi_label import LabelsEvaluation
from finetune.objective import build_objective
from finetune.starting_point import Start, build_classifier, starting_point
from pretrain.agreement import agreed_inputs, fingerprints, open_inputs
from pretrain.data.balanced import SampleOrder
from pretrain.data.packed_clips import PackedTrainingClips, grid_of_sample
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import TrainingClips
from pretrain.engine.checks import Check
from pretrain.engine.distributed import Processes
from pretrain.engine.run import Run
from pretrain.engine.saving import Exported, whole_weights
from pretrain.engine.tracking import METRICS, read_metrics
from pretrain.errors import Refused
from pretrain.files import sha256_of_file
from pretrain.identity import named_fields
from pretrain.model.encoder import EncoderConfig
from pretrain.report import Figure, Section, write_report
from pretrain.sets import RunSets, open_run_sets, save_division
from pretrain.stage import (
    curve_figures,
    going_on,
    is_finished,
    open_stage,
    order_of,
    say_finished,
    start_processes,
    summarise,
    train,
    validate,
)

logger = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """What a finetuning run reads, opened, and what follows from it.

    Attributes:
        sets: What it trains on and what is held out.
        order: The order of the samples.
        steps: Length of the run in steps.
        start: The folder of the pretrained encoder; None from scratch.
        trained: What is trained, by the full names of its fields.
        description: Describes the classifier.
        classifier: The classifier, with the weights to start from.
        clips: Cuts the training clips.
    """

    sets: RunSets
    order: SampleOrder
    steps: int
    start: Path | None
    trained: dict[str, Any]
    description: ModelDescription
    classifier: Classifier
    clips: TrainingClips


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Finetunes an encoder, or trains one from scratch, and leaves the classifier in the run's folder.

    Returns:
        The run's final figures, as in `summary.json`.

    Raises:
        Refused: The configuration, the shards, the encoder or the run's checkpoints do not fit; nothing was started.
        StoppedByRule: The run was stopped; its checkpoints are whole.
    """
    validate(config)
    opened = open_inputs(config, lambda: inputs_of(config))
    with start_processes(config) as processes:
        return finetune_in(processes, config, agreed_inputs(config, processes, opened, hashes_of))


def inputs_of(config: FinetuneConfig) -> Inputs:
    """Opens all that the run reads, and builds what it trains; raises `Refused` for what is wrong with it."""
    sets = open_labelled_sets(config)
    shards, held_out = sets.training[0], sets.held_out
    start = starting_point(config)
    order = order_of(config, shards)
    steps = config.total_steps(order.steps_per_epoch)
    description = describe(config, start.architecture, shards)
    torch.manual_seed(config.seed)
    classifier = build_classifier(description, start)
    add_adapters(classifier, config.lora, config.freeze)
    freeze(classifier, config.freeze)
    clips = training_clips(config, description, shards, held_out)
    trained = trained_fields(config, start, description)
    return Inputs(sets, order, steps, start.folder, trained, description, classifier, clips)


def hashes_of(inputs: Inputs) -> dict[str, str]:
    """Returns what must be the same on all nodes."""
    sets = inputs.sets
    data = fingerprints("data.shards", *sets.training) | fingerprints("validation.shards", sets.held_out)
    return data | {"encoder": str(inputs.trained["encoder"])[:12]}


def finetune_in(processes: Processes, config: FinetuneConfig, inputs: Inputs) -> dict[str, Any]:
    """Finetunes in processes that have found each other; see `finetune`."""
    shards, held_out, description = inputs.sets.training[0], inputs.sets.held_out, inputs.description
    with open_stage(config, processes, "finetune", inputs.order, (shards,), inputs.trained) as run:
        order, steps = going_on(config, inputs.order, run)
        if is_finished(run, steps):
            return say_finished(run)
        save_division(run, inputs.sets)
        warn_of_lone_samples(shards)
        if not run.saved:
            logger.info(f"starting from {inputs.start}" if inputs.start else "training from scratch")
        checks = []
        if held_out:
            measure = functools.partial(accuracy_on, held_out, config, description, run)
            checks.append(Check("a validation", config.validation.every, measure))
        model = train(
            config,
            run,
            order,
            steps,
            inputs.classifier,
            inputs.clips,
            build_objective(
                config.mixing, config.data.clip, len(shards.classes), bool(config.data.packing), shards.multi_label
            ),
            checks=checks,
            export=functools.partial(export_classifier, description, config.lora, run),
            averaging=config.ema,
        )
        # DeepSpeed may divide weights or hold them in half precision; what is compiled would be compiled anew.
        if not (run.processes.uses_deepspeed or config.compile):
            merge_adapters(run.processes.accelerator.unwrap_model(model), config.lora)
        summary = summarise(run, max(run.first_step, steps))
        evaluation, hardest = None, None
        if held_out:
            evaluation, hardest = evaluate_finally(model, held_out, config, description, run)
            summary |= evaluation.figures
        processes.on_main_only(
            lambda: write_finetuning_report(run.out, summary, evaluation, hardest or [], shards.classes)
        )
        run.finish(summary)
        return summary


def open_labelled_sets(config: FinetuneConfig) -> RunSets:
    """Opens the sets of a run; raises `Refused` if their labels do not do."""
    sets = open_run_sets(config)
    check_training_labels(sets.training[0])
    if sets.training[0].multi_label and config.data.packing:
        raise Refused(
            f"data.packing: packed clips have one label each, and the samples of {sets.training[0].folder} any number; "
            "leave data.packing out"
        )
    if sets.held_out:
        check_classes(sets.held_out, sets.training[0].classes, sets.training[0].multi_label)
    return sets


def warn_of_lone_samples(shards: ShardSet) -> None:
    """Warns of classes with one sample."""
    counts = Counter(label for labels in shards.label_lists() for label in labels)
    lone = [name for label, name in enumerate(shards.classes) if counts[label] == 1]
    if lone:
        more = f" (as have {len(lone) - 1} others)" if len(lone) > 1 else ""
        logger.warning(
            f"{shards.folder}: class {lone[0]!r} has one sample to train on{more}, which cannot tell what its videos "
            "share; add more of it"
        )


def describe(config: FinetuneConfig, architecture: EncoderConfig, shards: ShardSet) -> ModelDescription:
    """Returns the description of the classifier that the run trains."""
    return ModelDescription(
        dataclasses.replace(architecture, drop_path=config.drop_path),
        config.data.clip,
        config.head,
        shards.classes,
        shards.short_side,
        shards.frame_rate,
        config.data.packing,
        shards.multi_label,
    )


def trained_fields(config: FinetuneConfig, start: Start, description: ModelDescription) -> dict[str, Any]:
    """Returns what is trained, by the full names of its fields."""
    return {
        "encoder": sha256_of_file(start.folder / "model.safetensors") if start.folder else None,
        **named_fields("architecture", description.encoder),
        **named_fields("head", config.head),
        **named_fields("ema", config.ema),
        "freeze": config.freeze,
        **named_fields("lora", config.lora),
    }


def training_clips(
    config: FinetuneConfig, description: ModelDescription, shards: ShardSet, held_out: ShardSet | None
) -> TrainingClips:
    """Returns what cuts the run's clips; raises `Refused` where a set does not tell what packing needs to know."""
    if description.packed is None:
        return TrainingClips(shards, config.data, config.seed)
    if held_out:
        grid_of_sample(held_out, 0, description.packed)
    return PackedTrainingClips(shards, config.data, config.seed, description.packed)


def accuracy_on(
    held_out: ShardSet, config: FinetuneConfig, description: ModelDescription, run: Run, model: nn.Module
) -> dict[str, float]:
    """Computes single-view accuracy, to log while training; every rank calls it.

    Args:
        held_out: The held-out set.
        config: The run's configuration, which says how many of its samples are used.
        description: The classifier's description.
        run: The open run, whose processes share the samples.
        model: The prepared model.

    Returns:
        `validation_top1` and `validation_top5`, as shares; of a multi-label set `validation_mean_average_precision`.
    """
    views = ViewsConfig(temporal=1, spatial=1)
    evaluation = evaluate_on(
        model,
        cutter_of(held_out, description, views, config.data.decoder, config.data.decode_limit_s),
        config.validation.chosen(held_out.samples),
        description.classes,
        run.processes,
        samples_at_once(views),
        config.data.workers,
    )
    names = ("mean_average_precision",) if description.multi_label else ("top1", "top5")
    return {f"validation_{name}": evaluation.figures[name] for name in names}


def evaluate_finally(
    model: nn.Module, held_out: ShardSet, config: FinetuneConfig, description: ModelDescription, run: Run
) -> tuple[Evaluation | LabelsEvaluation, list[Figure] | None]:
    """Evaluates with all views and writes `evaluation.json` and `predictions.jsonl`; every rank calls it.

    Args:
        model: The prepared model.
        held_out: The held-out set, of which every sample is used.
        config: The run's configuration, which tells the views.
        description: The classifier's description.
        run: The open run.

    Returns:
        What was found, and on rank 0 the hardest videos, drawn.
    """
    cutter = cutter_of(held_out, description, config.views, config.data.decoder, config.data.decode_limit_s)
    evaluation = evaluate_on(
        model,
        cutter,
        np.arange(held_out.samples),
        description.classes,
        run.processes,
        samples_at_once(config.views),
        config.data.workers,
    )
    weights = {"weights": "as trained" if config.ema.decay is None else f"moving average, decay {config.ema.decay}"}
    record = circumstances(held_out, config.views) | weights
    run.processes.on_main_only(lambda: write_result(run.out, evaluation, record))
    if isinstance(evaluation, LabelsEvaluation):
        return evaluation, None
    return evaluation, run.processes.on_main_only(lambda: hardest_videos(evaluation, cutter))


def export_classifier(description: ModelDescription, lora: LoraConfig, run: Run, model: nn.Module) -> Exported | None:
    """Returns the classifier for the run's folder; every rank calls it, since ZeRO 3 gathers the weights."""
    weights = whole_weights(run.processes, model)
    if weights is None:
        return None
    return Exported(weights, lambda copied: save_classifier(run.out / "model", merged(copied, lora), description))


def write_finetuning_report(
    out: Path,
    summary: dict[str, Any],
    evaluation: Evaluation | LabelsEvaluation | None,
    hardest: Sequence[Figure],
    classes: tuple[str, ...],
) -> None:
    """Writes the run's page."""
    write_report(
        out / "report.html",
        title=f"Finetuning {out.name}",
        summary=f"{len(classes)} classes, {summary['steps']} steps.",
        headline=headline(evaluation.figures) if evaluation else [],
        sections=[
            Section("Curves", parts=curve_figures(read_metrics(out / METRICS))),
            *(evaluation_sections(evaluation, classes, hardest) if evaluation else []),
        ],
        facts={"command line": f"tubelet finetune --config {out / 'config.yaml'}"},
    )
