"""What is computed every so many steps and logged beside the loss: figures on held-out samples, and probes."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

Figures = dict[str, float]


def _find_nothing(step: int, figures: Figures) -> None:
    """The judgement of a check whose figures end no run."""


@dataclass(frozen=True)
class Check:
    """Figures that all ranks compute together every so many steps.

    Attributes:
        name: What it is, such as "a validation".
        every: Steps from one to the next; the last step has one too.
        measure: Called by all ranks with the prepared model, in evaluation mode and without gradients; returns the same
            figures on all of them.
        before_training: Whether there is one before the first step, as that of step 0.
        judge: Called by all ranks with the steps done and the figures, once these are logged; may raise `StoppedByRule`
            on all of them, and then the step is not saved.
    """

    name: str
    every: int
    measure: Callable[[nn.Module], Figures]
    before_training: bool = False
    judge: Callable[[int, Figures], None] = _find_nothing

    def is_due(self, done: int, steps: int) -> bool:
        """Whether it is made after `done` of `steps` steps."""
        if done == 0:
            return self.before_training
        return done % self.every == 0 or done == steps
