"""The first second of a job of several processes: whether the nodes can do the run together.

Each rank sends a small report of its versions, of what it reads and of what it could not open, and looks for a file
that rank 0 has written to the run's folder; rank 0 looks for theirs. What is wrong is told in one line with the names
of the hosts, and all ranks end together, before a model is built on a device. A process alone has nobody to differ
from. The devices have been compared before (`devices.py`), or there would be no process group.
"""

import contextlib
import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch

from pretrain.engine.devices import host_name, places
from pretrain.engine.distributed import Processes
from pretrain.engine.versions import LIBRARIES, installed_versions, source_hash
from pretrain.errors import EXIT_REFUSED, Refused, TubeletError
from pretrain.files import is_out_of_space

SAME_ENVIRONMENT = "install the same environment on all nodes, or one on a shared file system"
SHARED_FOLDER = "give --out as an absolute path on a file system that all nodes share"
SEEN_WITHIN_S = 3.0
"""How long a file that another node has written may stay unseen on a network file system."""
LOOK_EVERY_S = 0.05
STALE_S = 3600.0
MOST_NAMED = 3

Inputs = TypeVar("Inputs")


@dataclasses.dataclass(frozen=True)
class Same:
    """Values that must be the same on all ranks.

    Attributes:
        values: Each value by its name.
        remedy: What to do where one differs.
    """

    values: Mapping[str, str]
    remedy: str


class Report(NamedTuple):
    """What a rank tells the others.

    Attributes:
        host: Its node.
        same: What must be as on the others.
        error: What it could not open, with the exit code; None if nothing.
    """

    host: str
    same: tuple[Same, ...]
    error: tuple[str, int] | None


@dataclasses.dataclass(frozen=True)
class Opened(Generic[Inputs]):
    """What a run reads, or why this rank could not open it; a process alone raises that at once.

    Attributes:
        inputs: What was opened.
        error: Why it was not.
    """

    inputs: Inputs | None = None
    error: TubeletError | None = None

    @classmethod
    def by(cls, action: Callable[[], Inputs], world: int) -> "Opened[Inputs]":
        """Calls what opens it, in one of `world` processes."""
        try:
            return cls(action())
        except TubeletError as error:
            if world == 1:
                raise
            return cls(error=error)


def preflight(processes: Processes, folder: Path, opened: Opened[Inputs], same: Callable[[], Sequence[Same]]) -> Inputs:
    """Returns what was opened, once all ranks can start; every rank calls it.

    Args:
        processes: All processes of the run.
        folder: The run's folder, which must be the same on all nodes.
        opened: What this rank has opened or could not open.
        same: Tells what must be the same on all ranks, besides the versions; asked where there are several.

    Raises:
        Refused: The ranks cannot do the run together; all of them raise it and rank 0 tells it.
        TubeletError: Some of them cannot open what the run reads for another reason than bad input.
    """
    if processes.world > 1:
        error = None if opened.error is None else (str(opened.error), opened.error.exit_code)
        refuse_problems(processes.gather_objects(Report(host_name(), (versions_here(), *same()), error)))
        problems = problems_of_folder(processes, folder)
        if problems:
            raise _told(Refused("; ".join(problems)))
    assert opened.inputs is not None, "a process alone has raised, several have been refused"
    return opened.inputs


def refuse_problems(reports: Sequence[Report]) -> None:
    """Raises what is wrong with the reports of all ranks: what some could not open, or else what differs."""
    hosts = [report.host for report in reports]
    failed = [rank for rank, report in enumerate(reports) if report.error]
    if failed:
        by_text = _grouped({rank: report.error[0] for rank, report in enumerate(reports) if report.error})
        codes = {report.error[1] for report in reports if report.error}
        everywhere = len(by_text) == 1 and len(failed) == len(reports)
        texts = [text if everywhere else f"{places(ranks, hosts)}: {text}" for text, ranks in by_text.items()]
        error = TubeletError("; ".join(texts[:MOST_NAMED]))
        error.exit_code = EXIT_REFUSED if EXIT_REFUSED in codes else max(codes)
        raise _told(error)
    problems = differences([report.same for report in reports], hosts)
    if problems:
        raise _told(Refused("; ".join(problems)))


def differences(reported: Sequence[Sequence[Same]], hosts: Sequence[str]) -> list[str]:
    """Returns a sentence for each kind of value that is not the same on all ranks.

    Args:
        reported: What each rank reports, in the same order.
        hosts: The host of each rank.
    """
    problems = []
    for alike in zip(*reported, strict=False):  # another Tubelet may report more; that its version differs is told
        names = [name for name in alike[0].values if len({one.values.get(name) for one in alike}) > 1]
        told = []
        for name in names[:MOST_NAMED]:
            first, *others = _grouped({rank: one.values.get(name, "missing") for rank, one in enumerate(alike)}).items()
            elsewhere = ", ".join(f"{value} on {places(ranks, hosts)}" for value, ranks in others[:MOST_NAMED])
            told.append(f"{name}: is {first[0]} on {places(first[1], hosts)}, but {elsewhere}")
        if told:
            more = f", and {len(names) - MOST_NAMED} more differ" if len(names) > MOST_NAMED else ""
            problems.append(f"{', '.join(told)}{more}; {alike[0].remedy}")
    return problems


def _grouped(values: Mapping[int, str]) -> dict[str, list[int]]:
    """Returns the ranks of each value, in the order in which ranks have them."""
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    return ranks


def versions_here() -> Same:
    """Returns the versions of all that decides the figures of a run, as this process sees them."""
    installed = installed_versions()
    values = {name: installed.get(name, "missing") for name in ("Python", *LIBRARIES)}
    values["tubelet"] += f" (source {source_hash()})"
    values["CUDA of torch"] = str(torch.version.cuda)
    return Same(values, SAME_ENVIRONMENT)


def problems_of_folder(processes: Processes, folder: Path, keep: bool = True) -> list[str]:
    """Returns what is wrong with a folder that all ranks must see and write to, one sentence for each; all call it.

    Args:
        processes: All processes.
        folder: The folder, which is made where it is missing.
        keep: Whether it stays although it was missing, if nothing is wrong with it.
    """
    hosts = processes.gather_objects(host_name())
    made: list[Path] = []
    token, unwritable = processes.on_main(lambda: _write_probe(folder, made))
    if unwritable:
        problems = [unwritable]
    else:
        problem = None if processes.is_main else _look_and_answer(folder, token, processes.rank)
        told = processes.gather_objects(problem)
        unseen = processes.on_main(lambda: _unseen(folder, token, told))
        by_text = _grouped({rank: text for rank, text in enumerate(told) if text})
        problems = [f"out: {places(ranks, hosts)}: {text}" for text, ranks in list(by_text.items())[:MOST_NAMED]]
        if unseen:
            problems.append(
                f"out: {hosts[0]} (rank 0) does not see what {places(unseen, hosts)} wrote to {folder}; {SHARED_FOLDER}"
            )
    processes.on_main_only(lambda: _remove_probes(folder, token, () if keep and not problems else made))
    return problems


def _write_probe(folder: Path, made: list[Path]) -> tuple[str, str | None]:
    """Writes rank 0's probe; returns the name of all probes, and what hinders it. Notes the folders that it makes."""
    token = f".preflight-{secrets.token_hex(8)}"
    try:
        made.extend(path for path in (folder, *folder.parents) if not path.exists())
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".preflight-*"):
            with contextlib.suppress(FileNotFoundError):  # its owner may remove it at any moment
                if time.time() - stale.stat().st_mtime > STALE_S:
                    stale.unlink()
        (folder / f"{token}-0").write_text(token)
    except OSError as error:
        return token, f"out: {_why_unwritable(folder, error)}"
    return token, None


def _remove_probes(folder: Path, token: str, made: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):  # such as a folder that is not ours; what was to be found has been found
        for path in folder.glob(f"{token}-*"):
            path.unlink(missing_ok=True)
        for path in made:
            path.rmdir()


def _look_and_answer(folder: Path, token: str, rank: int) -> str | None:
    """Looks for rank 0's probe and writes this rank's; returns what fails."""
    if not _appears(folder / f"{token}-0", token):
        return f"cannot see what rank 0 wrote to {folder} ({folder.resolve()} here); {SHARED_FOLDER}"
    try:
        (folder / f"{token}-{rank}").write_text(token)
    except OSError as error:
        return _why_unwritable(folder, error)
    return None


def _why_unwritable(folder: Path, error: OSError) -> str:
    if is_out_of_space(error):
        return f"{folder.resolve()}: no space left on the disk; free some and start again"
    return f"{folder.resolve()}: cannot be written ({error.strerror}); mend its permissions or give another --out"


def _unseen(folder: Path, token: str, told: Sequence[str | None]) -> list[int]:
    """Returns the ranks whose probes rank 0 does not see although they have written them."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    written = [rank for rank in range(1, len(told)) if told[rank] is None]
    return [rank for rank in written if not _appears(folder / f"{token}-{rank}", token, deadline - time.monotonic())]


def _appears(path: Path, content: str, within_s: float = SEEN_WITHIN_S) -> bool:
    """Whether a file with some content is there or comes soon.

    Listing its folder, and the one above, which may have lacked it a moment ago, makes a client of NFS look again.
    """
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == content:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_EVERY_S)
        for folder in (path.parent.parent, path.parent):
            with contextlib.suppress(OSError):
                os.listdir(folder)


def _told(error: TubeletError) -> TubeletError:
    """Returns an error that all ranks meet, so that rank 0 alone tells it."""
    error.told = True
    return error
