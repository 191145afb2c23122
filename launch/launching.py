"""`tubelet launch`: its command line, up to `--`, and what follows it."""

import dataclasses
from collections.abc import Sequence

from launch.arguments import ArgumentParser
from launch.inner import split_chain
from launch.local import launch_local
from launch.slurm import SlurmOptions, launch_slurm
from pretrain.commandline import with_underscores
from pretrain.errors import Refused

USAGE = """tubelet launch local [--gpus N | --processes N] -- pretrain ... [--then finetune ...]
       tubelet launch slurm [OPTIONS] [--dry-run] -- pretrain ... [--then finetune ...]
       tubelet launch slurm [OPTIONS] [--array 0-15] [--dry-run] -- pack VIDEOS SHARDS ...
       tubelet launch local|slurm [OPTIONS] -- doctor ...    whether such a run could start there"""

SLURM_OPTIONS = {
    "nodes": (int, "N", "nodes"),
    "gpus": (int, "N", "GPUs of each node, with one task on each; 0 trains on CPU"),
    "tasks": (int, "N", "tasks on each node, with --gpus 0"),
    "cpus": (int, "N", "CPU cores of each task"),
    "time": (str, "TIME", "longest time of an attempt, such as 24:00:00; a run goes on in the next"),
    "partition": (str, "NAME", "partition"),
    "account": (str, "NAME", "account"),
    "array": (str, "0-N", "pack in N + 1 parts, each a task of an array; 0-N%%M runs M at a time"),
    "dependency": (str, "WHAT", "what to wait for, such as afterok:123"),
    "container": (str, "IMAGE", "image to run in: a .sif file for apptainer, or what srun's pyxis takes"),
}


def launch(arguments: Sequence[str]) -> None:
    """Starts or submits what stands behind `--`.

    Raises:
        Refused: The options, the command or SLURM speak against it; nothing was started.
    """
    place, *rest = arguments or [""]
    if place in ("-h", "--help"):
        print(f"usage: {USAGE}\n\ntubelet launch local --help and tubelet launch slurm --help tell the options.")
        return
    if place not in ("local", "slurm"):
        raise Refused(f"launch: {place or 'nothing'}: is no place to launch in; give local or slurm")
    parser = _local_parser() if place == "local" else _slurm_parser()
    if "--" not in rest and {"-h", "--help"} & set(rest):
        parser.parse_args(rest)
    options, chain = split_chain(rest)
    given = parser.parse_args(with_underscores(options))
    if place == "local":
        launch_local(chain, given.gpus, given.processes)
        return
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(SlurmOptions)}
    launch_slurm(chain, SlurmOptions(**fields), given.dry_run)


def _local_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="tubelet launch local", usage=USAGE, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs to use, with one process on each; all if not given")
    parser.add_argument("--processes", type=int, metavar="N", help="processes on the CPU instead")
    return parser


def _slurm_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="tubelet launch slurm",
        usage=USAGE,
        allow_abbrev=False,
        epilog="What is not given is as the script in slurm/ has it; sbatch also reads SBATCH_QOS and its like.",
    )
    for name, (kind, value, text) in SLURM_OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, metavar=value, help=text)
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print the script as it would run")
    return parser
