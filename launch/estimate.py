"""`tubelet estimate`: what a run would be, take and cost, before anything is allocated for it.

What follows from the configuration is computed: parameters, batches, steps, checkpoints, and the memory of weights,
gradients and optimiser. What depends on code is counted by running the model's own on fake tensors: activations and
operations. What depends on machines is not guessed: hours come from a measured throughput or not at all.
"""

import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import nn

from finetune.config import FinetuneConfig
from launch.order import read_config
from launch.throughput import Throughput, given, measured, of_run
from launch.trained_model import TrainedModel, finetuned_model, pretrained_model
from pretrain.commandline import find_recipe, parse, recipes_folder
from pretrain.config import PretrainConfig, RunConfig
from pretrain.data.order import Order
from pretrain.engine.activations import Kept, fake_activations, step_flops
from pretrain.engine.checkpoint_size import checkpoint_bytes, kept_checkpoints
from pretrain.engine.compiler import refuse_divided_weights
from pretrain.engine.memory import FULL, Zero, read_zero, state_bytes
from pretrain.errors import Refused
from pretrain.model.blocks import recompute_activations
from pretrain.sets import open_run_sets
from pretrain.stage import order_of

Stage = Literal["pretrain", "finetune"]
BATCHES = 2  # the one that is computed, and the one that is copied to the device meanwhile
NO_SHARDS = "(no shards yet)"


@dataclasses.dataclass(frozen=True)
class Question:
    """What to estimate.

    Attributes:
        config: A recipe or a file.
        overrides: Fields set on the command line.
        stage: What the recipe is for; None finds out.
        nodes: Nodes.
        gpus: GPUs of each.
        samples: Samples of the set, where there are no shards yet.
        classes: Classes of the set, where there are no shards yet.
        throughput: Clips per second of one GPU, where somebody knows.
        run: Folder of a run that trained the same model.
        measure: Whether to time steps here.
    """

    config: str
    overrides: list[str]
    stage: Stage | None = None
    nodes: int = 1
    gpus: int = 1
    samples: int | None = None
    classes: int | None = None
    throughput: float | None = None
    run: str | None = None
    measure: bool = False

    def validate(self) -> None:
        """Raises `Refused` for numbers below 1, and for more than one throughput."""
        for name in ("nodes", "gpus", "samples", "classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refused(f"--{name}: {value} must be at least 1")
        if (self.throughput is not None) + (self.run is not None) + self.measure > 1:
            raise Refused("--throughput, --from, --measure: give one of them")


def estimate(question: Question) -> dict[str, Any]:
    """Returns everything that `tubelet estimate --json` prints; bytes, seconds and counts are whole, not rounded.

    Raises:
        Refused: The run could not be either, or what a figure needs is missing.
    """
    question.validate()
    config, stage = read_run(question)
    world = question.nodes * question.gpus
    accumulation = config.accumulation(world)
    chosen = config.deepspeed_file
    if config.compile and chosen:
        refuse_divided_weights(chosen)
    length = length_of(config, question.samples)
    trained = trained_model(config, question.classes)
    model = trained.on_meta()
    counts = trained.parameters(model)
    parameters = sum(counts.values())
    flops = step_flops(model, trained.batch(trained.group), trained.loss) // (trained.group * config.data.repeats)
    clips_per_step = config.data.global_batch * config.data.repeats
    throughput = throughput_of(question, config, trained)
    batch = trained.batch(config.data.micro_batch)
    activations = {"plain": _activations(config, trained, batch, casts=False)}
    activations["DeepSpeed"] = activations["plain"]
    if config.precision != "fp32":
        activations["DeepSpeed"] = _activations(config, trained, batch, casts=True)
    batches = BATCHES * sum(part.nbytes for part in batch if hasattr(part, "nbytes"))
    rows = _memory_rows(config, world, chosen, model, activations, batches)
    steps = length["steps"]
    return {
        "stage": stage,
        "config": question.config,
        "nodes": question.nodes,
        "gpus": question.gpus,
        "world": world,
        "precision": config.precision,
        "activation_checkpointing": config.activation_checkpointing,
        "parameters": counts | {"total": parameters},
        "batch": {
            "global_batch": config.data.global_batch,
            "micro_batch": config.data.micro_batch,
            "accumulation": accumulation,
            "repeats": config.data.repeats,
            "clips_per_step": clips_per_step,
        },
        "length": length | {"clips": steps and steps * clips_per_step},
        "flops": {"clip": flops, "step": flops * clips_per_step, "run": steps and flops * clips_per_step * steps},
        "memory": rows,
        "activations": activations,
        "checkpoints": _checkpoints(config, steps, next(row for row in rows if row["configured"])),
        "time": throughput and _time(throughput, world, steps, clips_per_step),
    }


def _memory_rows(
    config: RunConfig,
    world: int,
    chosen: Path | None,
    model: nn.Module,
    activations: dict[str, dict[str, int]],
    batches: int,
) -> list[dict[str, Any]]:
    """Returns what one process holds under each engine, and what its checkpoints take."""
    numbers = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    constants = sum(buffer.numel() for buffer in model.buffers()) + numbers - trained
    stored = sum(value.numel() for value in model.state_dict().values()) - trained
    is_averaged = isinstance(config, FinetuneConfig) and config.ema.decay is not None
    average = FULL * (trained + stored) if is_averaged else 0
    configured = read_zero(chosen).stage if chosen else None
    rows = []
    for name, zero in engines_of(chosen).items():
        kept = activations["plain" if zero is None else "DeepSpeed"]
        state = state_bytes(trained, world, config.precision, zero, constants)
        state = dataclasses.replace(state, weights=state.weights + average)
        used = kept["recomputed" if config.activation_checkpointing else "kept"]
        row = {
            "engine": name,
            "configured": (zero.stage if zero else None) == configured,
            **dataclasses.asdict(state),
            "batches": batches,
            "activations": used,
            "total": state.device + batches + used,
            "checkpoint": checkpoint_bytes(trained, stored, config.precision, zero) + average,
        }
        rows.append(row)
    return rows


def read_run(question: Question) -> tuple[RunConfig, Stage]:
    """Returns the configuration and its stage; where it names no shards, it holds a placeholder for them.

    Raises:
        Refused: In the words of the run itself.
    """
    stage = question.stage or _stage_of(question.config)
    arguments = ["--config", question.config, *question.overrides]
    config: RunConfig
    if stage == "finetune":
        config = parse(FinetuneConfig, "finetune", arguments)
    elif question.stage:
        config = parse(PretrainConfig, "pretrain", arguments)
    else:
        config = read_config(question.config, question.overrides)
    if not config.data.shards and config.data.mixture is None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, shards=NO_SHARDS))
    elif question.samples is not None:
        raise Refused("--samples: the shards tell how many there are; leave it out, or leave out data.shards")
    of_finetuning = isinstance(config, FinetuneConfig)
    if question.classes is not None and not (of_finetuning and config.data.shards == NO_SHARDS):
        raise Refused("--classes: is for finetuning without data.shards, which tell how many there are; leave it out")
    config.validate()
    return config, "finetune" if of_finetuning else "pretrain"


def length_of(config: RunConfig, samples: int | None) -> dict[str, Any]:
    """Returns samples, steps and epochs of a run; None for what nobody knows without the set."""
    data = config.data
    steps_per_epoch = None
    if data.shards != NO_SHARDS:
        sets = open_run_sets(config).training
        samples = sum(one.samples for one in sets)
        steps_per_epoch = order_of(config, *sets).steps_per_epoch
    elif samples is not None:
        steps_per_epoch = Order(
            (samples,), config.seed, data.lanes, data.shards_per_window, data.global_batch
        ).steps_per_epoch
    if steps_per_epoch is not None:
        steps: int | None = config.total_steps(steps_per_epoch)
        warmup: int | None = config.optimizer.warmup(steps_per_epoch)
    else:
        steps = config.steps
        warmup = None if config.optimizer.warmup_epochs else config.optimizer.warmup_steps or 0
    return {
        "samples": samples,
        "steps_per_epoch": steps_per_epoch,
        "steps": steps,
        "epochs": steps / steps_per_epoch if steps and steps_per_epoch else config.epochs,
        "warmup_steps": warmup,
        "warmup_epochs": config.optimizer.warmup_epochs,
    }


def trained_model(config: RunConfig, classes: int | None) -> TrainedModel:
    """Returns what a run trains; raises `Refused` where nobody tells how many classes there are."""
    if isinstance(config, FinetuneConfig):
        if config.data.shards != NO_SHARDS:
            classes = len(open_run_sets(config).training[0].classes)
        if not classes:
            raise Refused("--classes: is missing; give the number of classes, or data.shards of a labelled set")
        return finetuned_model(config, classes)
    assert isinstance(config, PretrainConfig), "there are two stages"
    return pretrained_model(config)


def throughput_of(question: Question, config: RunConfig, trained: TrainedModel) -> Throughput | None:
    """Returns the measured throughput that was asked for, if any was."""
    if question.throughput is not None:
        return given(question.throughput)
    if question.run is not None:
        return of_run(Path(question.run), config, trained)
    return measured(config, trained) if question.measure else None


def engines_of(chosen: Path | None) -> dict[str, Zero | None]:
    """Returns plain data parallelism and each ZeRO stage, the configured one as its own file has it."""
    engines: dict[str, Zero | None] = {"no DeepSpeed": None}
    own = read_zero(chosen) if chosen else None
    for stage in range(4):
        zero = read_zero(find_recipe(f"zero{stage}", "deepspeed", ".json"))
        engines[f"ZeRO {stage}"] = own if own and own.stage == stage else zero
    return engines


def _activations(config: RunConfig, trained: TrainedModel, batch: Any, casts: bool) -> dict[str, int]:
    """Returns the bytes of activations without and with recomputation, which has one block whole at a time."""

    def kept(prepare: Callable[[nn.Module], None]) -> Kept:
        model = trained.on_meta()
        prepare(model)
        return fake_activations(model, batch, trained.loss, config.precision, casts)

    whole = kept(lambda model: None)
    return {"kept": whole.total, "recomputed": kept(recompute_activations).total + whole.largest}


def _checkpoints(config: RunConfig, steps: int | None, row: dict[str, Any]) -> dict[str, Any]:
    size = row["checkpoint"]
    kept = kept_checkpoints(steps, config.checkpoint) if steps else None
    return {
        "bytes": size,
        "every": config.checkpoint.every,
        "written": kept and kept.written,
        "kept": kept and kept.finally_kept,
        "kept_bytes": kept and kept.finally_kept * size,
        "most_bytes": kept and kept.most * size,
    }


def _time(throughput: Throughput, world: int, steps: int | None, clips_per_step: int) -> dict[str, Any]:
    speed = throughput.clips_per_second
    seconds = steps and steps * clips_per_step / (speed * world)
    return {
        "clips_per_second_per_gpu": speed,
        "source": throughput.source,
        "peak_gib": throughput.peak_gib,
        "hours": seconds and seconds / 3600,
        "gpu_hours": seconds and seconds * world / 3600,
    }


def _stage_of(name: str) -> Stage | None:
    """Returns the stage whose recipes know a name; None for a file, whose fields tell.

    Raises:
        Refused: Both know it, or none.
    """
    if Path(name).is_file():
        return None
    stages: tuple[Stage, ...] = ("pretrain", "finetune")
    recipes = {stage: [path.stem for path in (recipes_folder() / stage).glob("*.yaml")] for stage in stages}
    known = [stage for stage in stages if name in recipes[stage]]
    if len(known) > 1:
        raise Refused(f"{name}: is a recipe of configs/pretrain and of configs/finetune; give --stage with one of them")
    if not known:
        near = difflib.get_close_matches(name, [one for names in recipes.values() for one in names], n=1)
        remedy = f"did you mean {near[0]}?" if near else "they are listed there"
        raise Refused(f"{name}: is no file and no recipe of configs/pretrain or configs/finetune; {remedy}")
    return known[0]
