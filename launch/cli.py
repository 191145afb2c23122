"""The `tubelet` command: one subcommand for each thing a user does.

`pretrain` and `finetune` are also started by `python -m pretrain` and `python -m finetune`, so that torchrun,
accelerate, deepspeed and srun can start them. Whatever is slow to import is imported by the command that needs it.
"""

import importlib.metadata
import itertools
import json
import sys
from collections.abc import Callable

from launch.arguments import PACK, named, without_names
from launch.commands import compare, estimate, order, predict
from pretrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED

USAGE = """tubelet COMMAND ...

  pack VIDEOS SHARDS  make shards from a folder of videos, of class folders or of images, or from those that --list FILE
                      or --annotations FILE of Kinetics, Something-Something v2, UCF101 or HMDB51 names
  merge SHARDS        make one set of what `tubelet pack --part I/N` has packed on several nodes
  index TARS          make shards of a folder of WebDataset tars that others made, where they lie
  check SHARDS        read and decode all of a set of shards, and list what is wrong with it
  inspect SHARDS      tell what a set of shards holds, and draw a contact sheet of it
  pretrain            train an encoder on shards, without labels
  finetune            train a classifier on labelled shards, from an encoder or from scratch
  evaluate            measure a classifier on labelled shards
  probe               measure an encoder on labelled shards as it is: k-NN, linear and attentive probe
  compare RUN RUN ... set finetuning runs or evaluations on the same videos beside each other: one table and one page
  predict             name the most probable classes of video files and folders, as text or JSON
  doctor              check before a run starts, on this machine or on all nodes of a job, that it can
  launch              start pretrain or finetune on all GPUs of this machine, or submit them or pack to SLURM
  estimate            tell what a run would take: parameters, steps, memory of each GPU, checkpoints, GPU-hours
  convert SOURCE OUT  make weights of VideoMAE, ViViT, X-CLIP, ViT or MAE a model to start from, or ours theirs
  export MODEL OUT    write a classifier as one file that runs without Tubelet: NAME.pt2 (torch.export) or NAME.onnx
  order               list the clips that each step of a run reads, without decoding any
  demo                all of it in minutes, on videos that it makes itself

tubelet COMMAND --help tells the options of a command."""

SHARDS = {"shards": "SHARDS"}
"""The argument of most commands that may stand without its name."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[[list[str]], int]] = {
        "pack": _pack,
        "merge": _merge,
        "index": _index,
        "check": _check,
        "inspect": _inspect,
        "pretrain": _pretrain,
        "finetune": _finetune,
        "evaluate": _evaluate,
        "probe": _probe,
        "compare": compare,
        "predict": predict,
        "doctor": _doctor,
        "launch": _launch,
        "estimate": estimate,
        "convert": _convert,
        "export": _export,
        "order": order,
        "demo": _demo,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(importlib.metadata.version("tubelet"))
        return 0
    command = commands.get(arguments[0])
    if command is None:
        import difflib

        near = difflib.get_close_matches(arguments[0], commands, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(commands)}"
        print(f"tubelet: {arguments[0]}: there is no such command; {remedy}", file=sys.stderr)
        return 2
    try:
        return command(arguments[1:])
    except KeyboardInterrupt:  # while it was still being imported, which takes seconds
        print("tubelet: interrupted before anything was done", file=sys.stderr)
        return EXIT_INTERRUPTED


def _pretrain(arguments: list[str]) -> int:
    from pretrain.__main__ import main as pretrain

    return pretrain(arguments)


def _finetune(arguments: list[str]) -> int:
    from finetune.__main__ import main as finetune

    return finetune(arguments)


def _pack(arguments: list[str]) -> int:
    from pretrain.commandline import parse_plain, run_command
    from pretrain.data.pack import PackConfig, pack
    from pretrain.engine.progress import set_up_logging

    set_up_logging()
    return run_command(lambda: pack(parse_plain(PackConfig, "pack", named(arguments, PACK), PACK)))


def _merge(arguments: list[str]) -> int:
    from pretrain.commandline import parse_plain, run_command
    from pretrain.data.pack_merge import MergeConfig, merge
    from pretrain.engine.progress import set_up_logging

    set_up_logging()
    return run_command(lambda: merge(parse_plain(MergeConfig, "merge", named(arguments, SHARDS), SHARDS)))


def _index(arguments: list[str]) -> int:
    from pretrain.commandline import parse_plain, run_command
    from pretrain.data.index_tars import IndexConfig, index
    from pretrain.engine.progress import set_up_logging

    tars, rest = without_names(arguments)
    given = [f"--tars={json.dumps(tars)}"] if tars else []
    set_up_logging()
    return run_command(lambda: index(parse_plain(IndexConfig, "index", given + rest, {"tars": "TARS"})))


def _check(arguments: list[str]) -> int:
    from pretrain.commandline import parse_plain, run_command
    from pretrain.data.check import CheckConfig, check
    from pretrain.engine.progress import set_up_logging

    problems: list[object] = []

    def command() -> None:
        problems.extend(check(parse_plain(CheckConfig, "check", named(arguments, SHARDS), SHARDS)).problems)

    set_up_logging()
    return run_command(command) or (EXIT_FAILED if problems else EXIT_DONE)


def _inspect(arguments: list[str]) -> int:
    from pretrain.commandline import parse_plain, run_command
    from pretrain.data.inspection import InspectConfig, inspect
    from pretrain.engine.progress import set_up_logging

    set_up_logging()
    return run_command(lambda: inspect(parse_plain(InspectConfig, "inspect", named(arguments, SHARDS), SHARDS)))


def _evaluate(arguments: list[str]) -> int:
    from pretrain.commandline import met_by_every_rank, parse_plain, run_command
    from pretrain.engine.distributed import launched_rank
    from pretrain.engine.progress import set_up_logging

    def command() -> None:
        from finetune.evaluate import EvaluateConfig, evaluate

        with met_by_every_rank():
            config = parse_plain(EvaluateConfig, "evaluate", arguments)
        figures = evaluate(config).figures
        if launched_rank() == 0:
            from rich.console import Console

            from finetune.evaluation_page import figures_table

            Console().print(figures_table(figures))

    set_up_logging(main_process=launched_rank() == 0)
    return run_command(command)


def _probe(arguments: list[str]) -> int:
    from pretrain.commandline import met_by_every_rank, parse_plain, run_command
    from pretrain.engine.distributed import launched_rank
    from pretrain.engine.progress import set_up_logging

    def command() -> None:
        from rich.console import Console

        from finetune.probe import EncoderProbeConfig, probe, show

        alone = [*arguments, "--"]
        given = [
            f"{one}=true" if one == "--untrained" and following.startswith("--") else one
            for one, following in itertools.pairwise(alone)
        ]
        with met_by_every_rank():
            config = parse_plain(EncoderProbeConfig, "probe", given)
        found = probe(config)
        if found:
            show(config, found, Console(width=None if sys.stdout.isatty() else 120))

    set_up_logging(main_process=launched_rank() == 0)
    return run_command(command)


def _convert(arguments: list[str]) -> int:
    from pretrain.commandline import parse_plain, run_command
    from pretrain.engine.progress import set_up_logging

    def command() -> None:
        from launch.convert import ConvertConfig, convert

        alone = {"source": "SOURCE", "out": "OUT"}
        convert(parse_plain(ConvertConfig, "convert", named(arguments, alone), alone))

    set_up_logging()
    return run_command(command)


def _export(arguments: list[str]) -> int:
    from pretrain.commandline import parse_plain, run_command
    from pretrain.engine.progress import set_up_logging

    def command() -> None:
        from finetune.export import ExportConfig, export

        alone = {"model": "MODEL", "out": "OUT"}
        export(parse_plain(ExportConfig, "export", named(arguments, alone), alone))

    set_up_logging()
    return run_command(command)


def _doctor(arguments: list[str]) -> int:
    from pretrain.commandline import run_command
    from pretrain.engine.distributed import launched_rank
    from pretrain.engine.progress import set_up_logging

    def command() -> None:
        from launch.doctor import USAGE, doctor

        if {"-h", "--help"} & set(arguments):
            print(USAGE)
            return
        doctor(arguments)

    set_up_logging(main_process=launched_rank() == 0)
    return run_command(command)


def _launch(arguments: list[str]) -> int:
    from launch.launching import launch
    from pretrain.commandline import run_command
    from pretrain.engine.progress import set_up_logging

    set_up_logging()
    return run_command(lambda: launch(arguments))


def _demo(arguments: list[str]) -> int:
    from pretrain.commandline import parse_plain, run_command
    from pretrain.engine.progress import set_up_logging

    def command() -> None:
        from launch.demo import DemoConfig, demo

        demo(parse_plain(DemoConfig, "demo", arguments))

    set_up_logging()
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
