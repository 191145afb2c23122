"""How long a run is, and when it does what: all that the training loop has to know of the configuration."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long a run is and when it does what.

    Attributes:
        first_step: Steps done already.
        samples_read: Samples that these steps read.
        samples_padded: Samples that were too short for their time window in these steps.
        steps: Steps in the whole run.
        accumulation: Micro-batches in a step.
        samples_per_step: Samples that all ranks together read in a step.
        repeats: Clips cut from each sample.
        seed: Seed of dropout, drop path and mixup.
        clip_grad: Greatest gradient norm, or None.
        log_every: Steps between lines of `metrics.jsonl`.
        checkpoint_every: Steps between checkpoints.
        max_bad_share: Share of bad samples past which the run stops.
        unvalidated: Figures of the last step done, where the attempt before was stopped in the checks of that step.
        profile: Steps that are traced, counted from 1; None traces none.
    """

    first_step: int
    samples_read: int
    samples_padded: int
    steps: int
    accumulation: int
    samples_per_step: int
    repeats: int
    seed: int
    clip_grad: float | None
    log_every: int
    checkpoint_every: int
    max_bad_share: float
    unvalidated: dict[str, Any] | None = None
    profile: range | None = None
