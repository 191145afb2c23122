"""The `tubelet` command: one subcommand for each thing a user does.

`pretrain` and `finetune` are also started by `python -m pretrain` and `python -m finetune`, so that torchrun,
accelerate, deepspeed and srun can start them. Whatever is slow to import is imported by the command that needs it.
"""

import importlib.metadata
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from launch.arguments import PACK, ArgumentParser, named, without_names
from pretrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED

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
  export MODEL OUT    write a classifier as one file of torch.export, which runs without Tubelet
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
        "compare": _compare,
        "predict": _predict,
        "doctor": _doctor,
        "launch": _launch,
        "estimate": _estimate,
        "convert": _convert,
        "export": _export,
        "order": _order,
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


def _compare(arguments: list[str]) -> int:
    from pretrain.commandline import run_command

    parser = ArgumentParser(
        prog="tubelet compare",
        allow_abbrev=False,
        description="Compares runs on the same videos; differences are to the first, paired video by video.",
        epilog="A RUN is a finetuning run, or the folder of an evaluation or of a probe.",
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="runs that stand for themselves")
    parser.add_argument(
        "--group",
        action="append",
        nargs="+",
        default=[],
        metavar=("NAME", "RUN"),
        help="runs of one thing, such as seeds or folds, under a name; may be given several times",
    )
    parser.add_argument("--out", default="runs/comparison", metavar="FOLDER", help="where the page goes (%(default)s)")

    def command() -> None:
        parsed = parser.parse_args(arguments)
        from rich.console import Console

        from finetune.compare import compare, names_of
        from finetune.comparison_page import comparison_tables, write_comparison

        alone = [(name, (run,)) for name, run in zip(names_of(parsed.runs), parsed.runs, strict=True)]
        comparison = compare([*alone, *((name, runs) for name, *runs in parsed.group)])
        page = write_comparison(Path(parsed.out), comparison)
        console = Console(width=None if sys.stdout.isatty() else 120)
        for table in comparison_tables(comparison):
            console.print(table)
        print(f"look at {page}")

    return run_command(command)


def _predict(arguments: list[str]) -> int:
    from pretrain.commandline import run_command, with_underscores
    from pretrain.data.video import DecoderName

    parser = ArgumentParser(
        prog="tubelet predict",
        allow_abbrev=False,
        description="Names the most probable classes of video files. A file that cannot be read is named, the others "
        "are predicted all the same, and the exit code is 1.",
    )
    parser.add_argument("paths", nargs="+", metavar="FILE", help="video files, or folders of them at any depth")
    parser.add_argument("--model", required=True, help="model folder or finetuning run")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes of each video (5)")
    parser.add_argument("--temporal", type=int, default=3, metavar="N", help="time windows of each video (3)")
    parser.add_argument("--spatial", type=int, default=1, metavar="N", help="crops of each time window (1)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each video, on a line of its own")
    parser.add_argument("--decoder", default="auto", choices=get_args(DecoderName), help="who decodes")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that read videos ahead (2)")
    parser.add_argument("--stall_s", type=float, default=60, metavar="S", help="give a video up after this long (60)")
    parser.add_argument("--micro_batch", type=int, default=4, metavar="N", help="videos in the model at once (4)")
    predicted: list[bool] = []

    def command() -> None:
        options = vars(parser.parse_args(with_underscores(arguments)))
        from finetune.config import ViewsConfig
        from finetune.predict import PredictionOptions, load_predictor

        paths, as_json = options.pop("paths"), options.pop("json")
        model = load_predictor(options.pop("model"))
        views = ViewsConfig(options.pop("temporal"), options.pop("spatial"))
        for prediction in model.predict(paths, PredictionOptions(views, **options)):
            predicted.append(prediction.error is None)
            if prediction.error:
                print(f"tubelet: {prediction.file}: {' '.join(prediction.error.split())}", file=sys.stderr)
            if as_json:
                classes = [{"name": name, "probability": round(share, 6)} for name, share in prediction.classes]
                print(json.dumps({"file": prediction.file, "classes": classes, "error": prediction.error}), flush=True)
            elif not prediction.error:
                shares = [f"\n  {100 * probability:5.1f} %  {name}" for name, probability in prediction.classes]
                print(prediction.file + "".join(shares), flush=True)

    code = run_command(command)
    if code or all(predicted):
        return code
    return EXIT_FAILED if any(predicted) else EXIT_REFUSED


def _estimate(arguments: list[str]) -> int:
    from pretrain.commandline import run_command, with_underscores
    from pretrain.engine.progress import set_up_logging

    parser = ArgumentParser(
        prog="tubelet estimate",
        allow_abbrev=False,
        description="Tells what a run would take before it is started. Nothing is written.",
        epilog="Any field of the configuration can be set too, such as --data.shards SHARDS or --deepspeed zero2.",
    )
    parser.add_argument("--config", required=True, metavar="NAME", help="a recipe, or a run's config.yaml")
    parser.add_argument("--stage", choices=("pretrain", "finetune"), help="what the recipe is for, where both have one")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (1)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of each node (1)")
    parser.add_argument("--samples", type=int, metavar="N", help="samples of the set, where there are no shards yet")
    parser.add_argument("--classes", type=int, metavar="N", help="its classes, to finetune")
    parser.add_argument("--throughput", type=float, metavar="X", help="clips per second of one GPU, for GPU-hours")
    parser.add_argument("--from", dest="run", metavar="RUN", help="take the throughput of a run of the same model")
    parser.add_argument("--measure", action="store_true", help="measure the throughput here, by a few steps")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")

    def command() -> None:
        parsed, overrides = parser.parse_known_args(with_underscores(arguments))
        from rich.console import Console

        from launch.estimate import Question, estimate
        from launch.estimate_tables import show

        options = vars(parsed)
        as_json = options.pop("json")
        estimated = estimate(Question(overrides=overrides, **options))
        if as_json:
            print(json.dumps(estimated, indent=2))
        else:
            show(estimated, Console(width=None if sys.stdout.isatty() else 120))

    set_up_logging()
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


def _order(arguments: list[str]) -> int:
    from pretrain.commandline import run_command, with_underscores

    parser = ArgumentParser(
        prog="tubelet order",
        allow_abbrev=False,
        description="Lists the clips that each rank reads in each step, as JSON lines, without decoding a frame.",
        epilog="Any field of the configuration can be set too, such as --data.shards SHARDS or --seed 1.",
    )
    parser.add_argument("--config", required=True, metavar="NAME", help="a pretraining recipe, or a run's config.yaml")
    parser.add_argument("--steps", required=True, metavar="A:B", help="first and last step; metrics.jsonl counts alike")
    parser.add_argument("--world", type=int, default=1, help="processes of the run (1)")
    parser.add_argument("--workers", help="loader processes of each; the configuration's if not given")
    parser.add_argument("--resumed_at", type=int, default=0, help="steps done when the attempt started (0)")

    def command() -> None:
        parsed, overrides = parser.parse_known_args(with_underscores(arguments))
        from launch.order import clips_read

        overrides += [] if parsed.workers is None else [f"--data.workers={parsed.workers}"]
        try:
            for clip in clips_read(parsed.config, overrides, parsed.steps, parsed.world, parsed.resumed_at):
                print(json.dumps(clip))
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

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
