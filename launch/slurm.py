"""`tubelet launch slurm`: submits the scripts of `slurm/` with options, exactly as a person would by hand."""

import dataclasses
import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from launch.inner import Inner, checked_chain
from pretrain.errors import Refused

SUBMISSION_S = 120


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
    """What a job asks of SLURM; None leaves it to the script.

    Attributes:
        nodes: Nodes.
        gpus: GPUs of each node, with one task on each; 0 trains on CPU.
        tasks: Tasks on each node, where there are no GPUs.
        cpus: CPU cores of each task.
        time: Longest time of an attempt.
        partition: Partition.
        account: Account.
        array: Numbers of the tasks of an array, such as 0-15.
        dependency: What to wait for, such as afterok:123.
        container: Image to run in: a .sif file for apptainer, or what srun's pyxis takes.
    """

    nodes: int | None = None
    gpus: int | None = None
    tasks: int | None = None
    cpus: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    array: str | None = None
    dependency: str | None = None
    container: str | None = None

    def validate(self, chain: list[Inner]) -> None:
        """Raises `Refused` where the options contradict each other or the command."""
        for name, least in (("nodes", 1), ("gpus", 0), ("tasks", 1), ("cpus", 1)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise Refused(f"{name}: {number} must be at least {least}")
        packs = chain[0].name == "pack"
        if self.array is not None and not packs:
            raise Refused(f"array: {chain[0].name} is one job, not many; launch it once for each configuration")
        if self.array is not None and not re.fullmatch(r"0-[1-9]\d*(%[1-9]\d*)?", self.array):
            raise Refused(f"array: {self.array} does not do; give 0-15 for 16 parts, 0-15%4 for four at a time")
        if packs and (self.gpus or self.tasks or self.nodes):
            raise Refused("nodes, gpus, tasks: pack needs none; give --array 0-15 for 16 parts and --cpus for each")
        if self.tasks is not None and self.gpus != 0:
            raise Refused("tasks: each GPU has one task; give --gpus 0 to train on CPU")
        if self.container and self.container.endswith(".sif") and not Path(self.container).is_file():
            raise Refused(f"container: {self.container}: no such file; build it with apptainer")

    @property
    def tasks_per_node(self) -> int | None:
        """Tasks of each node, where the options tell."""
        return None if self.gpus is None else (self.gpus or self.tasks or 1)


@dataclasses.dataclass(frozen=True)
class Submission:
    """One call of sbatch.

    Attributes:
        script: A script of `slurm/`.
        options: Options of sbatch, without their dashes, that win over the script's own.
        environment: Variables that the script reads.
        arguments: What follows the script.
    """

    script: Path
    options: dict[str, str]
    environment: dict[str, str]
    arguments: tuple[str, ...]

    def command(self) -> list[str]:
        """Returns the command line."""
        options = [f"--{name}={value}" for name, value in self.options.items()]
        return ["sbatch", *options, str(self.script), *self.arguments]

    def text(self) -> str:
        """Returns the script as it would run: with these options, variables and arguments written into it."""
        lines = self.script.read_text().splitlines()
        left = dict(self.options)
        for number, line in enumerate(lines):
            directive = re.match(r"#SBATCH --([\w-]+)", line)
            if directive and directive[1] in left:
                lines[number] = f"#SBATCH --{directive[1]}={left.pop(directive[1])}"
        last = max(number for number, line in enumerate(lines) if re.match("#+SBATCH ", line))
        variables = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        added = [f"#SBATCH --{name}={value}" for name, value in left.items()]
        return "\n".join(
            [*lines[: last + 1], *added, "", *variables, f"set -- {shlex.join(self.arguments)}", *lines[last + 1 :], ""]
        )

    def submit(self) -> str:
        """Submits; returns the job's number.

        Raises:
            Refused: There is no SLURM here, or it refuses, in its own words.
        """
        command = self.command()
        command.insert(1, "--parsable")
        try:
            done = subprocess.run(
                command, env=os.environ | self.environment, capture_output=True, text=True, timeout=SUBMISSION_S
            )
        except FileNotFoundError:
            raise Refused("sbatch: there is no such program here; run this on a login node of the cluster") from None
        except subprocess.TimeoutExpired:
            raise Refused(f"sbatch: no answer within {SUBMISSION_S} s; see squeue whether the job is there") from None
        if done.returncode:
            words = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines()]
            raise Refused(f"sbatch: {'; '.join(filter(None, words))}; sinfo tells what the cluster has")
        return done.stdout.strip().split(";")[0]


def scripts_folder() -> Path:
    """Returns the folder of batch scripts: inside the package in a wheel, beside it in a checkout."""
    packaged = Path(__file__).parent / "batch"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "slurm"


def launch_slurm(chain: list[Inner], options: SlurmOptions, dry_run: bool) -> None:
    """Submits commands as jobs, each after the one before, or prints the scripts.

    Raises:
        Refused: The options, a command or SLURM itself speak against it; no job is left in the queue.
    """
    options.validate(chain)
    worlds = [_world(inner, options) for inner in chain]
    chain = checked_chain(chain, worlds, options.gpus == 0, options.dependency is not None)
    plans = _planned(chain, options)
    if dry_run:
        for number, plan in enumerate(plans):
            print(plan(f"JOB{number}" if number else "").text())
        return
    submitted: list[tuple[str, Submission]] = []
    try:
        for plan in plans:
            submission = plan(submitted[-1][0] if submitted else "")
            submitted.append((submission.submit(), submission))
    except Refused:
        for job, _ in submitted:
            subprocess.run(["scancel", job], check=False)
        raise
    for job, submission in submitted:
        print(f"job {job}: {shlex.join(submission.command())}")


def _world(inner: Inner, options: SlurmOptions) -> int:
    """Returns how many tasks will run a command: what the options do not tell, the script does."""
    script = (scripts_folder() / f"{inner.name}.sbatch").read_text()
    tasks = options.tasks_per_node or int(_directive(script, "ntasks-per-node") or 1)
    return tasks * (options.nodes or int(_directive(script, "nodes") or 1))


def _directive(script: str, name: str) -> str | None:
    found = re.search(rf"^#SBATCH --{name}=(\S+)", script, re.M)
    return found[1] if found else None


def _planned(chain: list[Inner], options: SlurmOptions) -> list[Callable[[str], Submission]]:
    """Returns what makes each submission from the number of the job before it."""
    environment = {"TUBELET_SLURM": str(scripts_folder())}
    environment |= {"TUBELET_CONTAINER": options.container} if options.container else {"TUBELET_PYTHON": sys.executable}
    steps = [(inner.name, inner.arguments) for inner in chain]
    if chain[0].name == "pack":
        steps.append(("merge", (chain[0].out,)))

    def plan(name: str, arguments: tuple[str, ...], after: str) -> Submission:
        given = _sbatch_options(name, options)
        if after:
            given |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
        return Submission(scripts_folder() / f"{name}.sbatch", given, environment, arguments)

    return [functools.partial(plan, *step) for step in steps]


def _sbatch_options(name: str, options: SlurmOptions) -> dict[str, str]:
    per_node = options.tasks_per_node
    given: dict[str, object] = {
        "nodes": options.nodes,
        "gpus-per-node": options.gpus,
        "ntasks-per-node": per_node,
        "cpus-per-task": options.cpus,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "dependency": options.dependency,
    }
    if name == "pack":
        given["array"] = options.array
    if name == "merge":
        given["cpus-per-task"] = None
    return {option: str(value) for option, value in given.items() if value is not None}
