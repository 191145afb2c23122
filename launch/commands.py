"""The subcommands that have no configuration and parse their own arguments: compare, predict, estimate, order."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from launch.arguments import ArgumentParser
from pretrain.errors import EXIT_FAILED, EXIT_REFUSED

if TYPE_CHECKING:
    from finetune.predict import Prediction


def compare(arguments: list[str]) -> int:
    """Sets runs beside each other; returns the exit code."""
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


def predict(arguments: list[str]) -> int:
    """Names the classes of videos; returns the exit code."""
    from pretrain.commandline import run_command, with_underscores
    from pretrain.data.video import DecoderName

    parser = ArgumentParser(
        prog="tubelet predict",
        allow_abbrev=False,
        description="Names the most probable classes of video files. A file that cannot be read is named, the others "
        "are predicted all the same, and the exit code is 1.",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="FILE",
        help="video files, or folders of them at any depth; of pictures where a folder holds no video",
    )
    parser.add_argument("--model", required=True, help="model folder or finetuning run")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes of each video (5)")
    parser.add_argument("--temporal", type=int, default=3, metavar="N", help="time windows of each video (3)")
    parser.add_argument("--spatial", type=int, default=1, metavar="N", help="crops of each time window (1)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each video, on a line of its own")
    parser.add_argument("--decoder", default="auto", choices=get_args(DecoderName), help="who decodes")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that read videos ahead (2)")
    parser.add_argument("--stall_s", type=float, default=60, metavar="S", help="give a video up after this long (60)")
    parser.add_argument("--micro_batch", type=int, default=4, metavar="N", help="videos in the model at once (4)")
    parser.add_argument(
        "--explain",
        metavar="FOLDER",
        help="write FOLDER/NAME.mp4 for each video: where the model's attention goes in the view that decided most",
    )
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
            _print_prediction(prediction, as_json, explains=options["explain"] is not None)

    go_on = "the files that are printed are done; give the others to go on, and --explain, if given, another folder"
    code = run_command(command, go_on)
    if code or all(predicted):
        return code
    return EXIT_FAILED if any(predicted) else EXIT_REFUSED


def _print_prediction(prediction: "Prediction", as_json: bool, explains: bool) -> None:
    if prediction.error:
        print(f"tubelet: {prediction.file}: {' '.join(prediction.error.split())}", file=sys.stderr)
    if as_json:
        classes = [{"name": name, "probability": round(share, 6)} for name, share in prediction.classes]
        told = {"file": prediction.file, "classes": classes, "error": prediction.error}
        told |= {"explanation": prediction.explanation} if explains else {}
        print(json.dumps(told), flush=True)
    elif not prediction.error:
        shares = [f"\n  {100 * probability:5.1f} %  {name}" for name, probability in prediction.classes]
        shares += [f"\n  explained by {prediction.explanation}"] if prediction.explanation else []
        print(prediction.file + "".join(shares), flush=True)


def estimate(arguments: list[str]) -> int:
    """Tells what a run would take; returns the exit code."""
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


def order(arguments: list[str]) -> int:
    """Lists the clips that a run reads; returns the exit code."""
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
