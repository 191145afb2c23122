"""The command that `tubelet launch` starts on many processes, checked before the first of them is started."""

import dataclasses
from typing import Any

from launch.arguments import PACK, named
from pretrain.errors import Refused

COMMANDS = ("pretrain", "finetune", "pack", "doctor")


@dataclasses.dataclass(frozen=True)
class Inner:
    """A subcommand of `tubelet` with its command line.

    Attributes:
        name: One of `COMMANDS`.
        arguments: What follows it.
        out: The folder that it writes to.
    """

    name: str
    arguments: tuple[str, ...]
    out: str = ""


def split_chain(arguments: list[str]) -> tuple[list[str], list[Inner]]:
    """Separates the options of `tubelet launch` from the commands after `--`, and those from each other at `--then`.

    Returns:
        The options, and one or two commands.

    Raises:
        Refused: There is no command, it cannot be launched, or the commands do not follow each other.
    """
    if "--" not in arguments:
        raise Refused("launch: what to launch is missing; give it after --, such as -- pretrain --config videomae_b")
    place = arguments.index("--")
    chain: list[list[str]] = [[]]
    for argument in arguments[place + 1 :]:
        if argument == "--then":
            chain.append([])
        else:
            chain[-1].append(argument)
    for command in chain:
        if not command or command[0] not in COMMANDS:
            named = command[0] if command else "nothing"
            raise Refused(f"launch: {named} cannot be launched; after -- or --then give {', '.join(COMMANDS)}")
    if len(chain) > 1 and [command[0] for command in chain] != ["pretrain", "finetune"]:
        raise Refused("launch: --then joins pretrain and finetune; launch anything else by itself, with --dependency")
    return arguments[:place], [Inner(command[0], tuple(command[1:])) for command in chain]


def checked_chain(chain: list[Inner], worlds: list[int], on_cpu: bool, waits: bool = False) -> list[Inner]:
    """Returns commands with their folders, after refusing what they would refuse themselves when they start.

    A finetuning that follows a pretraining starts from its encoder unless it names another.

    Args:
        chain: The commands, each started when the one before it is done.
        worlds: Number of processes that will run each.
        on_cpu: Whether these use no GPU.
        waits: Whether the first starts after other jobs, which may make what it reads.

    Raises:
        Refused: Something is wrong with one, in the words of the command itself, or two write to one folder.
    """
    done: list[Inner] = []
    for inner, world in zip(chain, worlds, strict=True):
        if done and not _has_option(inner, "--encoder"):
            inner = dataclasses.replace(inner, arguments=(*inner.arguments, "--encoder", done[-1].out))
        inner = _checked(inner, world, on_cpu, waits or bool(done))
        if inner.name != "pack" and not _has_option(inner, "--out"):
            inner = dataclasses.replace(inner, arguments=(*inner.arguments, "--out", inner.out))
        if done and inner.out == done[-1].out:
            raise Refused(f"out: {inner.name} and {done[-1].name} both write to {inner.out}; give each its own --out")
        done.append(inner)
    return done


def _has_option(inner: Inner, name: str) -> bool:
    return any(argument.split("=")[0] == name for argument in inner.arguments)


def _checked(inner: Inner, world: int, on_cpu: bool, waits: bool) -> Inner:
    if {"-h", "--help", "--print_config", "--print-config"} & set(inner.arguments):
        raise Refused(f"launch: tubelet {inner.name} --help or --print_config starts nothing; run it by itself")
    if inner.name == "pack":
        return _checked_pack(inner)
    config = _read(inner)
    if inner.name == "doctor":  # which tells itself what is wrong with a configuration
        return dataclasses.replace(inner, out=config.out)
    config.validate()
    config.accumulation(world)
    if on_cpu and config.precision == "fp16":
        raise Refused("precision: fp16 needs a GPU; use bf16 or fp32")
    if config.deepspeed:
        _refuse_engine(config)
    if not waits:
        _refuse_input(inner.name, config)
    return dataclasses.replace(inner, out=config.out)


def _read(inner: Inner) -> Any:
    from finetune.config import FinetuneConfig
    from pretrain.commandline import parse
    from pretrain.config import PretrainConfig

    if inner.name == "finetune":
        return parse(FinetuneConfig, "finetune", list(inner.arguments))
    return parse(PretrainConfig, "pretrain", list(inner.arguments))


def _refuse_engine(config: Any) -> None:
    """Raises `Refused` where a DeepSpeed configuration is missing or unreadable, or cannot train a compiled model."""
    from pretrain.engine.compiler import refuse_divided_weights
    from pretrain.engine.deepspeed_file import read_deepspeed

    file = config.deepspeed_file
    read_deepspeed(file)
    if config.compile:
        refuse_divided_weights(file)


def _refuse_input(name: str, config: Any) -> None:
    """Raises `Refused` where shards, weights or checkpoints do not do, or the run is shorter than its warm-up."""
    from pretrain.sets import open_run_sets
    from pretrain.stage import order_of

    sets = open_run_sets(config).training
    order = order_of(config, *sets)
    config.total_steps(order.steps_per_epoch)
    refuse_missing_weights(config)
    _refuse_other_run(name, config, order, sets)


def refuse_missing_weights(config: Any) -> None:
    """Raises `Refused` where the weights that a run starts from are not there."""
    from pretrain.weights import find_encoder

    weights = getattr(config, "init", None) or getattr(config, "encoder", None)
    if isinstance(weights, str):
        find_encoder(weights)


def _refuse_other_run(name: str, config: Any, order: Any, sets: Any) -> None:
    """Raises `Refused` where the run's folder holds checkpoints that this run would not go on from."""
    from pretrain.identity import refuse_other_run

    if name == "pretrain":
        from pretrain.pretraining import trained_fields

        trained = trained_fields(config)
    else:
        from finetune import finetuning

        start = finetuning.starting_point(config)
        trained = finetuning.trained_fields(config, start, finetuning.describe(config, start.architecture, sets[0]))
    refuse_other_run(config, name, order, sets, trained)


def _checked_pack(inner: Inner) -> Inner:
    from pretrain.commandline import parse_plain
    from pretrain.data.pack import PackConfig

    config = parse_plain(PackConfig, "pack", named(list(inner.arguments), PACK), PACK)
    config.validate()
    if config.part is not None:
        raise Refused("part: the tasks of the array pack one part each; drop --part and give launch slurm --array")
    return dataclasses.replace(inner, out=config.out)
