"""When what is saved: a checkpoint first, then the export of its weights, both at once or both beside training.

Beside training the step that saves only copies, into host memory, what is to be written. A thread of each rank writes
its part of the checkpoint. That it has done so, or failed, travels with the figures that the trainer gathers in every
step anyway; once all ranks have, all commit the checkpoint between two steps. Then a thread of rank 0 writes the
export, whose weights were copied in the step that the checkpoint is of: an export never holds what no checkpoint does.

At most one save is in flight. The next one waits for it, and so does the end of a run by a signal or by a rule. The
last checkpoint of a run, and that of one which is told to stop, are written at once.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from torch import Tensor, nn

from pretrain.engine.checkpoint import Checkpoints
from pretrain.engine.distributed import Processes
from pretrain.engine.rank_files import zero_stage
from pretrain.errors import StoppedByRule

logger = logging.getLogger(__name__)


class Exported(NamedTuple):
    """Weights on their way into a file.

    Attributes:
        weights: The weights, by the names that they have there.
        write: Writes them.
    """

    weights: dict[str, Tensor]
    write: Callable[[dict[str, Tensor]], None]


Export = Callable[[nn.Module], Exported | None]
"""From the prepared model, on all ranks, to what rank 0 writes; None on the others."""


class Saving:
    """Saves a run.

    Args:
        checkpoints: Writes checkpoints, in the background if its configuration says so.
        processes: All processes of the run.
        export: Returns what is exported after each checkpoint; None exports nothing.
    """

    def __init__(self, checkpoints: Checkpoints, processes: Processes, export: Export | None = None) -> None:
        """Nothing is in flight yet."""
        self.checkpoints = checkpoints
        self.processes = processes
        self.export = export
        self._in_flight = False  # alike on all ranks
        self._exported: Exported | None = None
        self._exporting: Future[None] | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="export")

    def save(self, step: int, model: nn.Module, optimizer: Any, state: dict[str, Any], at_once: bool = False) -> None:
        """Saves, or begins to; every rank calls it.

        Args:
            step: Steps done.
            model: The prepared model.
            optimizer: The prepared optimiser.
            state: What the checkpoint notes beside the weights.
            at_once: Whether it has to be done on return, whatever the configuration says.

        Raises:
            DiskFull: No space is left; the checkpoint before is untouched.
            StoppedByRule: Another job has taken over the run.
            TubeletError: A rank failed to write this checkpoint, or the one in flight.
        """
        if at_once or not self.checkpoints.config.background:
            self._exported = None  # a newer one follows
            was_in_flight, self._in_flight = self._in_flight, False
            self.checkpoints.save(step, model, optimizer, state)  # after the one in flight
            if was_in_flight:
                self._finish_export()
            if self.export:
                write_export(self.processes, self.export(model))
            return
        self.finish()
        exported = self.export(model) if self.export else None
        copied = self.checkpoints.begin(step, model, optimizer, state, exported.weights if exported else None)
        self._in_flight = True
        self._exported = exported._replace(weights=copied) if exported else None

    @property
    def awaits_commit(self) -> bool:
        """Whether a checkpoint is in flight; alike on all ranks."""
        return self.checkpoints.is_in_flight

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its part of the checkpoint in flight, or failed to, or none is in flight."""
        return self.checkpoints.is_written

    def commit(self) -> None:
        """Commits the checkpoint in flight and begins to write its export; every rank calls it; raises as `save`."""
        exported, self._exported = self._exported, None
        try:
            self.checkpoints.finish()
        except Exception:
            self._in_flight = False  # on all ranks, though not all of them raise the same
            raise
        if exported:
            self._exporting = self._writer.submit(exported.write, exported.weights)

    def finish(self) -> None:
        """Waits for all that is in flight; every rank calls it, and it raises as `save`."""
        if not self._in_flight:
            return
        self._in_flight = False
        self.commit()
        self._finish_export()

    def _finish_export(self) -> None:
        exporting, self._exporting = self._exporting, None
        self.processes.on_main_only(lambda: exporting.result() if exporting else None)

    def finish_before_the_end(self) -> None:
        """As `finish`, where the run ends for another reason, which a failure to save must not hide."""
        try:
            self.finish()
        except Exception as error:
            logger.warning("the last save, or its export, may be lost: %s", error)

    @contextlib.contextmanager
    def finished_at_the_end(self) -> Iterator[None]:
        """Finishes what is in flight when an error ends the context, if all ranks are sure to meet it together."""
        try:
            yield
        except Exception as error:
            met_by_all = isinstance(error, StoppedByRule) and error.told  # not by the one rank that lacks a sample
            if self.processes.world == 1 or met_by_all:
                self.finish_before_the_end()
            raise


def write_export(processes: Processes, exported: Exported | None) -> None:
    """Writes what rank 0 has to export; every rank calls it."""
    processes.on_main_only(lambda: exported.write(exported.weights) if exported else None)


def whole_weights(processes: Processes, model: nn.Module) -> dict[str, Tensor] | None:
    """Returns the weights of a prepared model under the model's own names, on rank 0; every rank calls it.

    They are the model's own, but for ZeRO 3, which gathers them.
    """
    if processes.uses_deepspeed and zero_stage(processes) == 3:
        weights = processes.accelerator.get_state_dict(model)
    elif processes.is_main:
        weights = processes.accelerator.unwrap_model(model).state_dict()
    return weights if processes.is_main else None
