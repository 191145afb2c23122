"""A trace of a few steps by torch's profiler, for `--profile A:B`: rank 0 writes `profile/steps-A-B.json` into the run.

The file is in Chrome's format, which https://ui.perfetto.dev and chrome://tracing show. Steps count as in
`metrics.jsonl`, from 1, and a step lasts until the next begins: waiting for data, a validation and a save are in it.
"""

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pretrain.errors import Refused
from pretrain.files import replacing

logger = logging.getLogger(__name__)

PROFILE = "profile"
MOST_STEPS = 100
"""A trace is kept in memory until it is written."""


def steps_to_profile(wanted: str | None) -> range | None:
    """Returns the steps that `A:B` names, both included; raises `Refused` if it names none, or too many."""
    if wanted is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", wanted)
    if not found:
        raise Refused(f"profile: {wanted!r} names no steps; give the first and the last, such as 10:12")
    first, last = map(int, found.groups())
    if not 1 <= first <= last:
        raise Refused(f"profile: {wanted} names no steps; they count from 1, and the first comes first: 10:12")
    if last - first >= MOST_STEPS:
        raise Refused(f"profile: {wanted} are {last - first + 1} steps; give {MOST_STEPS} at most")
    return range(first, last + 1)


@contextlib.contextmanager
def profiled(steps: range, wanted: range | None, folder: Path) -> Iterator[Iterable[int]]:
    """Yields steps to iterate over, which are traced where that is wanted.

    A run that goes on in the middle of what is wanted traces the rest of it; one that ends there writes what it has.

    Args:
        steps: Numbers of the steps, counted from 0.
        wanted: Numbers of those to trace, counted from 1; None traces nothing and costs nothing.
        folder: Where the trace is written; one that cannot be costs a warning.
    """
    traced = [step for step in steps if wanted and step + 1 in wanted]
    if not traced:
        if wanted:
            logger.warning("profile: steps %d to %d are none of this attempt; no trace", wanted[0], wanted[-1])
        yield steps
        return
    with contextlib.ExitStack() as tracing:
        yield _traced(steps, traced, folder, tracing)


def _traced(steps: range, traced: list[int], folder: Path, tracing: contextlib.ExitStack) -> Iterator[int]:
    yield from range(steps.start, traced[0])
    trace = tracing.enter_context(_trace(folder))
    for step in traced:
        trace.append(step + 1)
        with record_function(f"step {step + 1}"):
            yield step
    tracing.close()
    yield from range(traced[-1] + 1, steps.stop)


@contextlib.contextmanager
def _trace(folder: Path) -> Iterator[list[int]]:
    """Traces while the context is open, then writes the file; the caller notes the steps."""
    noted: list[int] = []
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler = profile(activities=activities, record_shapes=True)
    profiler.start()
    try:
        yield noted
    finally:
        _write(profiler, folder / f"steps-{noted[0]}-{noted[-1]}.json")


def _write(profiler: profile, path: Path) -> None:
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler.stop()
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            profiler.export_chrome_trace(str(temporary))
    except Exception as error:  # it must not hide why a run ends
        logger.warning("%s cannot be written (%s); the run goes on without it", path, error)
        return
    logger.info("wrote a trace: %s", path)
