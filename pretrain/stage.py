"""What pretraining and finetuning share: opening data, processes and the run's folder, training, and the figures."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from torch import nn

from pretrain.commandline import met_by_every_rank, to_dict, to_yaml
from pretrain.config import RunConfig
from pretrain.data.balanced import BalancedOrder, SampleOrder
from pretrain.data.config import DataConfig
from pretrain.data.loader import Batch, MicroBatches, training_batches
from pretrain.data.order import Mixture, Order, Start, lanes_of_sets, nearest_divisor
from pretrain.data.packed_clips import PackedBatch, PackedTrainingClips, packed_batches
from pretrain.data.randomness import seed_of_set
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import TrainingClips
from pretrain.engine.averaging import AverageConfig, WeightAverage
from pretrain.engine.checkpoint_size import checkpoint_bytes_of
from pretrain.engine.checks import Check
from pretrain.engine.compiler import refuse_divided_weights
from pretrain.engine.distributed import Processes, launched_world
from pretrain.engine.optimizer import build_optimizer, members_of_groups
from pretrain.engine.plan import Plan
from pretrain.engine.profiling import steps_to_profile
from pretrain.engine.progress import set_up_logging
from pretrain.engine.run import KEYS, SKIPPED, Run, open_run, refuse_other_groups
from pretrain.engine.saving import Export, write_export
from pretrain.engine.schedule import build_schedule
from pretrain.engine.tracking import METRICS, read_metrics
from pretrain.engine.trainer import Objective, Trainer
from pretrain.errors import Refused
from pretrain.identity import identity_of, overridden_fields
from pretrain.model.blocks import recompute_activations
from pretrain.report import Figure, curves

logger = logging.getLogger(__name__)

PROBED = ("probe_errors", "probe_knn", "probe_rank", "probe_deviation", "collapsed")
"""The figures of a probe, under their names in the record."""


def order_of(config: RunConfig, *sets: ShardSet) -> SampleOrder:
    """Returns the order of samples of a run over its set, or over the sets of its mixture.

    Raises:
        Refused: The lanes, the weights or the samples do not come out even, a set is too small, or classes shall be
            balanced where there are no labels.
    """
    data = config.data
    if data.class_power < 1:
        labels = labels_to_balance(data, sets[0])
        return BalancedOrder(labels, config.seed, data.lanes, data.global_batch, data.class_power)
    if data.mixture is None:
        return Order(sets[0].samples_per_shard, config.seed, data.lanes, data.shards_per_window, data.global_batch)
    if data.global_batch % data.lanes:
        raise Refused(
            f"data.lanes: {data.lanes} lanes do not divide data.global_batch {data.global_batch}; "
            f"use {nearest_divisor(data.global_batch, data.lanes)}"
        )
    orders = []
    for number, (shards, lanes) in enumerate(zip(sets, lanes_of_sets(data.mixture, data.lanes), strict=True)):
        places = lanes * (data.global_batch // data.lanes)
        if shards.samples < places:
            raise Refused(
                f"data.mixture: {shards.folder} holds {shards.samples} samples, fewer than the {places} that a step "
                f"takes of it; lower its weight or add samples"
            )
        seed = seed_of_set(config.seed, number)
        orders.append(Order(shards.samples_per_shard, seed, lanes, data.shards_per_window, places))
    return Mixture(tuple(orders))


def labels_to_balance(data: DataConfig, shards: ShardSet) -> tuple[int, ...]:
    """Returns the class of each sample of a set whose classes are balanced; raises `Refused` if it has no labels."""
    if not shards.labelled:
        raise Refused(
            f"data.class_power: {data.class_power} balances classes, but {shards.folder} has no labels; pack it from "
            f"class folders or with --list, or leave data.class_power at 1"
        )
    if shards.multi_label:
        raise Refused(
            f"data.class_power: {data.class_power} balances sets of one label a sample, but those of {shards.folder} "
            f"have any number; leave it at 1"
        )
    return tuple(shards.labels())


def validate(config: RunConfig) -> None:
    """Raises `Refused` for whatever is wrong in the configuration itself, which every rank finds alike."""
    with met_by_every_rank():
        config.validate()


def start_processes(config: RunConfig) -> Processes:
    """Joins the other processes of the run.

    Raises:
        Refused: The batch does not divide among them, one has no DeepSpeed file, or their devices cannot do what is
            asked for.
    """
    with met_by_every_rank():
        accumulation = config.accumulation(launched_world())
    deepspeed, problem = None, None
    try:
        deepspeed = config.deepspeed_file
        if config.compile and deepspeed:
            refuse_divided_weights(deepspeed)
    except Refused as error:  # of this node alone, perhaps
        problem = str(error)
    processes = Processes(
        config.precision,
        accumulation,
        config.data.micro_batch,
        config.optimizer.clip_grad,
        deepspeed,
        problem=problem,
    )
    set_up_logging(main_process=processes.is_main)
    return processes


def open_stage(
    config: RunConfig,
    processes: Processes,
    stage: str,
    order: SampleOrder,
    sets: tuple[ShardSet, ...],
    trained: dict[str, Any],
) -> AbstractContextManager[Run]:
    """Opens the run's folder; see `open_run`.

    Args:
        config: The run's configuration.
        processes: All processes of the run.
        stage: `pretrain` or `finetune`.
        order: The order of the samples.
        sets: The training set, or the sets of a mixture.
        trained: What is trained, by the full names of its fields. Like the samples and their order it must not change
            between attempts.
    """
    identity, told = identity_of(config, order, sets, trained)
    return open_run(
        config.out,
        processes,
        stage,
        to_dict(config),
        to_yaml(config),
        config.resume,
        config.tracking,
        identity,
        config.checkpoint,
        told,
        overridden_fields(order, trained),
        config.override_config,
        config.stopping,
    )


def going_on(config: RunConfig, order: SampleOrder, run: Run) -> tuple[SampleOrder, int]:
    """Returns the order and the length in steps with which an open run goes on.

    Where the global batch changed, now or in an attempt before, the order goes on from the epoch and position reached,
    so that no sample of that epoch is read twice.
    """
    if not (run.saved and isinstance(order, Order)):
        return order, config.total_steps(order.steps_per_epoch)
    start = Start(*run.saved.state.get("start", ()))
    batch = run.saved.state["identity"]["data.global_batch"]
    order = dataclasses.replace(order, start=start)
    if batch != order.global_batch:
        order = order.going_on_from(dataclasses.replace(order, global_batch=batch), run.saved.step)
    run.state["start"] = list(order.start)
    steps = config.total_steps(order.steps_per_epoch)
    if order.start.step and config.epochs is not None:
        steps = order.length_in_steps(config.epochs)
    return order, steps


def train(
    config: RunConfig,
    run: Run,
    order: SampleOrder,
    steps: int,
    model: nn.Module,
    clips: TrainingClips,
    objective: Objective,
    checks: Sequence[Check],
    export: Export,
    averaging: AverageConfig | None = None,
) -> nn.Module:
    """Trains a model to the end of the run, from its checkpoint where it has one; every rank calls it.

    Args:
        config: The run's configuration.
        run: The open run; its record begins here, once the checkpoint is loaded.
        order: The order of the samples.
        steps: Length of the run in steps.
        model: The model, with the weights to start from where there is no checkpoint.
        clips: Cuts the training clips.
        objective: Computes the loss of a batch.
        checks: What is computed every so many steps, such as figures on held-out samples.
        export: Called by all ranks with the prepared model for each checkpoint, to export its weights; or with a model
            that has their average.
        averaging: Whether the weights are averaged; checks, export and the returned model have the average then.

    Returns:
        The model, prepared for this world and trained.

    Raises:
        Refused: The checkpoint holds another model.
        DiskFull: There is no room for one more checkpoint.
        StoppedByRule: A rule stopped the run.
        Preempted: A signal or a limit of time ended it. The model returned raises it too, when it is used.
    """
    processes = run.processes
    average = None
    if averaging and averaging.decay is not None:
        average = WeightAverage(model, averaging, processes)
        run.checkpoints.include(average)
        logger.info("validation, evaluation and the exported model have the moving average of the weights")
        export = _exporting_average(export, average)
    if run.first_step < steps:
        first_bytes = checkpoint_bytes_of(model, config.precision, config.deepspeed_file)
        run.checkpoints.refuse_without_room(first_bytes + (average.size_bytes if average else 0))
    if config.activation_checkpointing:
        recompute_activations(model)
    if config.compile:
        model.compile()  # in place, which leaves all names as they are
    model, optimizer, schedule = _prepared(config, run, order, steps, model)
    tracker = run.begin()
    trainer = Trainer(
        plan_of(config, run, order.global_batch, steps),
        processes,
        model,
        optimizer,
        schedule,
        objective,
        run.checkpoints,
        tracker,
        run.out / SKIPPED,
        run.state,
        checks,
        export,
        run.out / KEYS if config.log_keys else None,
        run.stop,
        run.watchdog,
        average,
    )
    requests = MicroBatches(
        order, range(run.first_step, steps), config.data.micro_batch, processes.world, processes.rank
    )
    trainer.train(batches_of(clips, requests, pin_memory=processes.device.type == "cuda"), run.state["stage"])
    if run.first_step >= steps:  # the last attempt ended between its last checkpoint and the export
        write_export(processes, export(model))
    if average:
        average.put_into(model)
    run.stop.abandon_forward(model, processes, "after its last step, which is saved")
    return model


def _prepared(
    config: RunConfig, run: Run, order: SampleOrder, steps: int, model: nn.Module
) -> tuple[nn.Module, Any, Any]:
    """Returns model, optimiser and schedule, prepared for this world and as the run's checkpoint left them."""
    batch = order.global_batch
    optimizer = build_optimizer(model, config.optimizer, batch)
    run.state["groups"] = members_of_groups(model, optimizer)
    if run.saved:
        refuse_other_groups(run.saved, run.state["groups"])
    schedule = build_schedule(optimizer, config.optimizer, batch, config.optimizer.warmup(order.steps_per_epoch), steps)
    model, optimizer = run.processes.prepare(model, optimizer)
    schedule.optimizer = optimizer
    if run.saved:
        run.checkpoints.load(run.saved, model, optimizer)
    return model, optimizer, schedule


def _exporting_average(export: Export, average: WeightAverage) -> Export:
    return lambda _: export(average.model)


def plan_of(config: RunConfig, run: Run, global_batch: int, steps: int) -> Plan:
    """Returns how long an open run is and when it does what; arguments as for `train`."""
    saved = run.saved.state if run.saved else {}
    return Plan(
        first_step=run.first_step,
        samples_read=saved.get("samples_read", run.first_step * global_batch),
        samples_padded=saved.get("samples_padded", 0),
        steps=steps,
        accumulation=config.accumulation(run.processes.world),
        samples_per_step=global_batch,
        repeats=config.data.repeats,
        seed=config.seed,
        clip_grad=config.optimizer.clip_grad,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint.every,
        max_bad_share=config.data.max_bad_share,
        unvalidated=saved.get("unvalidated"),
        profile=steps_to_profile(config.profile),
    )


def batches_of(clips: TrainingClips, requests: MicroBatches, pin_memory: bool) -> Iterator[Batch | PackedBatch]:
    """Yields the rank's micro-batches, packed where the clips are."""
    if isinstance(clips, PackedTrainingClips):
        return packed_batches(clips, requests, pin_memory)
    return training_batches(clips, requests, pin_memory)


def summarise(run: Run, steps: int) -> dict[str, Any]:
    """Returns a run's final figures from its metrics; every rank calls it."""
    metrics = run.processes.on_main(lambda: read_metrics(run.out / METRICS))
    last = metrics[-1] if metrics else {}
    speeds = [entry["clips_per_second"] for entry in metrics if "clips_per_second" in entry]
    waits = [entry["data_wait_s"] for entry in metrics if "data_wait_s" in entry]
    summary = {
        "steps": steps,
        "loss": last.get("loss"),
        "validation_loss": last.get("validation_loss"),
        "validation_errors": last.get("validation_errors"),
        **{name: last.get(name) for name in PROBED},
        "clips_per_second": float(np.median(speeds)) if speeds else None,
        "data_wait_s": float(np.median(waits)) if waits else None,
        "memory_gib": last.get("memory_gib"),
        "world": run.processes.world,
    }
    return {name: value for name, value in summary.items() if value is not None}


def is_finished(run: Run, steps: int) -> bool:
    """Whether all steps are done and the final figures, which are written last, are those of the newest checkpoint."""

    def has_final_figures() -> bool:
        try:
            return json.loads((run.out / "summary.json").read_text())["steps"] >= run.first_step
        except (OSError, ValueError, KeyError, TypeError):
            return False

    return run.first_step >= steps and run.processes.on_main(has_final_figures)


def say_finished(run: Run) -> dict[str, Any]:
    """Says that there is nothing left to do, and returns what `summary.json` holds."""
    logger.info("%s is finished: step %d is done; give more --steps to go on", run.out, run.first_step)
    return run.processes.on_main(lambda: json.loads((run.out / "summary.json").read_text()))


def curve_figures(metrics: list[dict[str, Any]]) -> list[Figure]:
    """Returns the curves of a run: loss, learning rate, gradient norm."""
    steps = [entry["step"] for entry in metrics]
    losses = {"training": (steps, [entry.get("loss") for entry in metrics])}
    held_out = [entry for entry in metrics if "validation_loss" in entry]
    if held_out:
        losses["held-out"] = [entry["step"] for entry in held_out], [entry["validation_loss"] for entry in held_out]
    figures = [Figure(curves(losses, "Loss", "step", "loss"))]
    for name, title in (("learning_rate", "Learning rate"), ("gradient_norm", "Gradient norm")):
        values = [entry.get(name) for entry in metrics]
        figures.append(Figure(curves({name: (steps, values)}, title, "step", title.lower())))
    return figures
