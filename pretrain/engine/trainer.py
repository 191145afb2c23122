"""The training loop: one loop for pretraining and finetuning, from a laptop to many nodes.

The loop names its stages in order. Whatever changes over a run (learning rate, samples, random draws of the model) is
a function of the step, so nothing of it needs to be stored. Losses are looked at one step late, so that reading them
never makes the GPU wait; a checkpoint is written only after all of them were found finite. With these figures goes
whether a rank was told to stop (see `preemption.py`), so all ranks save and end in the same step.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from pretrain.engine.averaging import WeightAverage
from pretrain.engine.checkpoint import Checkpoints
from pretrain.engine.checks import Check, Figures
from pretrain.engine.distributed import Processes
from pretrain.engine.draws import seed_draws
from pretrain.engine.feeding import begin_reading, on_device
from pretrain.engine.plan import Plan
from pretrain.engine.preemption import Cause, StopRequests, first_cause
from pretrain.engine.profiling import PROFILE, profiled
from pretrain.engine.progress import Progress
from pretrain.engine.saving import Export, Saving
from pretrain.engine.step_figures import LOADER_COSTS, count_skipped, loader_shares, memory_gib, weights_are_finite
from pretrain.engine.tracking import Tracker, read_metrics
from pretrain.engine.watchdog import Watchdog
from pretrain.errors import Preempted, StoppedByRule, TubeletError
from pretrain.files import append_json_lines, sync_file

logger = logging.getLogger(__name__)

FEW_SAMPLES = 10  # bad samples that are always forgiven, so that the share means something in a short run

Objective = Callable[[nn.Module, Any], Tensor]
"""From the prepared model and a batch on the device to the mean loss of its clips."""


class _StepRecord(NamedTuple):
    """What is known of a step when the next one starts; the loss may still be on its way from the device."""

    step: int
    loss_and_norm: Callable[[], list[float]]
    learning_rate: float
    seconds: float
    data_wait_s: float
    padded: int
    keys: list[str]
    skipped: list[dict]
    costs: list[float]
    metrics: Figures | None  # None where a check is due that the next attempt will make


class Trainer:
    """Trains a model from batches, and keeps the run's record.

    Args:
        plan: Lengths and intervals.
        processes: All processes of the run.
        model: The prepared model.
        optimizer: The prepared optimiser.
        schedule: Sets the learning rates for a step by `step_update(step)`.
        objective: Computes the loss of a batch.
        checkpoints: Writes checkpoints.
        tracker: Writes metrics.
        skipped_path: File to which rank 0 appends the samples passed over; it holds those of the steps before.
        state: What checkpoints note beside the weights.
        checks: What is computed every so many steps.
        export: Returns what is exported after each checkpoint.
        keys_path: File to which rank 0 appends the keys of each step's samples; None writes none.
        stop: Knows whether this rank was told to stop.
        watchdog: Is told what the run is about to do.
        average: Takes in the weights after each step.
    """

    def __init__(
        self,
        plan: Plan,
        processes: Processes,
        model: nn.Module,
        optimizer: Any,
        schedule: Scheduler,
        objective: Objective,
        checkpoints: Checkpoints,
        tracker: Tracker,
        skipped_path: Path,
        state: dict[str, Any],
        checks: Sequence[Check] = (),
        export: Export | None = None,
        keys_path: Path | None = None,
        stop: StopRequests | None = None,
        watchdog: Watchdog | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        """Keeps the arguments."""
        self.plan = plan
        self.processes = processes
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.objective = objective
        self.saving = Saving(checkpoints, processes, export)
        self.tracker = tracker
        self.skipped_path = skipped_path
        self.state = state
        self.checks = checks
        self.keys_path = keys_path
        self.average = average
        self.stop = stop or StopRequests()
        self.watchdog = watchdog or Watchdog(0, skipped_path.parent, processes.rank, lambda reason: None)
        self.samples_read = plan.samples_read
        self.samples_padded = plan.samples_padded
        before = processes.on_main(lambda: count_skipped(read_metrics(skipped_path)))
        self.samples_skipped, self.samples_quarantined = before
        self._failure: TubeletError | OSError | None = None
        self._cause: Cause | None = None
        self._unvalidated: dict[str, Any] | None = None
        self._clock = time.perf_counter()

    def train(self, batches: Iterable[Any], description: str) -> None:
        """Runs all steps that are left.

        Args:
            batches: This rank's micro-batches, from `plan.first_step` on.
            description: Stands before the progress bar.

        Raises:
            StoppedByRule: A loss or a weight was not finite, too many samples could not be decoded, or a check found
                that the run is worth no more steps.
            DiskFull: No space is left for the record or for a checkpoint.
            Preempted: A signal or a limit of time ended the run; the steps done are saved.
        """
        plan = self.plan
        waiting = on_device(batches, self.processes.device)
        previous: _StepRecord | None = None
        progress = Progress(plan.steps, plan.first_step, description, self.processes.is_main, plan.log_every)
        to_profile = plan.profile if self.processes.is_main else None
        tracing = profiled(range(plan.first_step, plan.steps), to_profile, self.skipped_path.parent / PROFILE)
        with self.watchdog.watching(), progress, self.saving.finished_at_the_end(), tracing as steps:
            self._begin()
            for step in steps:
                record = self._step(step, waiting)
                if previous is not None:
                    self._settle(previous, progress)
                previous = record
                done = step + 1
                checks = self._checks_due(done)
                if checks or self._cause or self._is_due(done, plan.checkpoint_every):
                    figures = self._measure_unless_stopped(checks)
                    self._settle(previous._replace(metrics=figures), progress)
                    previous = None
                    self._judge(checks, done, figures)
                    self._save_if_due(done)
                    self._seconds_since_last()
                self.watchdog.expect(f"step {done + 1}")

    def _begin(self) -> None:
        """Ends here if the run was told to stop before; else makes the checks that are due before the next step.

        Those are the ones before the first step, or those that the last attempt owed.
        """
        plan = self.plan
        cause = self.stop.agreed(self.processes)
        if cause:
            saved = f"after step {plan.first_step}, which is saved" if plan.first_step else "before its first step"
            raise cause.error(saved)
        checks = self._checks_due(plan.first_step)
        if plan.unvalidated is not None or (plan.first_step == 0 and checks):
            measured = self._measure(checks)
            figures = (plan.unvalidated or {}) | measured
            self._write(lambda: self.tracker.log(plan.first_step, figures))
            self._judge(checks, plan.first_step, measured)
        self._seconds_since_last()

    def _save_if_due(self, done: int) -> None:
        """Writes a checkpoint if it is time for one or the run was told to stop, in which case it ends here."""
        if not (self._cause or self._is_due(done, self.plan.checkpoint_every)):
            return
        self.watchdog.expect(f"the checkpoint of step {done}", slow=True)
        self._write(self._sync_record)
        self._check_before_saving(done)
        counts = {"samples_read": self.samples_read, "samples_padded": self.samples_padded}
        state = self.state | counts | {"unvalidated": self._unvalidated}
        is_last = self._cause is not None or done == self.plan.steps
        self.saving.save(done, self.model, self.optimizer, state, at_once=is_last)
        if self._cause:
            raise self._cause.error(f"after step {done}, which is saved")

    def _is_due(self, done: int, every: int) -> bool:
        return every > 0 and (done % every == 0 or done == self.plan.steps)

    def _step(self, step: int, batches: Iterator[Any]) -> _StepRecord:
        """Takes one optimiser step and returns its record without waiting for the device."""
        self.model.train()
        self.schedule.step_update(step)
        accelerator = self.processes.accelerator
        loss_sum = torch.zeros((), device=self.processes.device)
        gradient_norm: Any = math.nan
        data_wait_s, padded, keys, skipped = 0.0, 0, [], []
        costs = [0.0] * len(LOADER_COSTS)
        for micro_batch in range(self.plan.accumulation):
            wait_started = time.perf_counter()
            batch = next(batches)
            data_wait_s += time.perf_counter() - wait_started
            keys += batch.keys
            padded += batch.padded
            skipped += batch.skipped
            costs = [total + getattr(batch.costs, name) for total, name in zip(costs, LOADER_COSTS, strict=True)]
            seed_draws(self.plan.seed, step, self.processes.rank, micro_batch)
            with accelerator.accumulate(self.model):
                loss = self.objective(self.model, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(
                        self.model.parameters(), self.plan.clip_grad or math.inf
                    )
                    if gradient_norm is None:  # ZeRO 0 computes none unless it clips
                        gradient_norm = math.nan
                self.optimizer.step()
                self.optimizer.zero_grad()
            loss_sum += loss.detach().float()
        if self.average:
            self.average.update(self.model, step + 1)
        return _StepRecord(
            step=step,
            loss_and_norm=begin_reading(loss_sum / self.plan.accumulation, gradient_norm),
            learning_rate=max(group["lr"] for group in self.optimizer.param_groups),
            seconds=self._seconds_since_last(),
            data_wait_s=data_wait_s,
            padded=padded,
            keys=keys,
            skipped=skipped,
            costs=costs,
            metrics={},
        )

    def _seconds_since_last(self) -> float:
        """Returns the time since the last call: in the loop, a step with its wait for data and for the device."""
        before, self._clock = self._clock, time.perf_counter()
        return self._clock - before

    def _settle(self, record: _StepRecord, progress: Progress) -> None:
        """Gathers a step's figures from all ranks, stops the run if they ask for it, and logs them."""
        own_loss, gradient_norm = record.loss_and_norm()
        own = [own_loss, record.data_wait_s, record.seconds, memory_gib(self.processes.device)]
        counts = [record.padded, len(record.skipped), self._failure is not None, self.stop.code, self.saving.is_written]
        gathered = self.processes.gather(torch.tensor([*own, *counts, *record.costs], dtype=torch.float64))
        loss, data_wait_s, seconds, memory, padded, skipped, failed, stops, written, *costs = gathered.unbind(1)
        self._end_if_failed(failed)
        self._stop_if_not_finite(record, loss)
        self._cause = self._cause or first_cause(stops)
        if written.all() and self.saving.awaits_commit:
            self.watchdog.expect("the checkpoint in flight", slow=True)
            self.saving.commit()
        self.samples_read += self.plan.samples_per_step
        self.samples_padded += int(padded.sum())
        if skipped.sum() > 0:
            self._note_skipped(record)
        if self.keys_path:
            self._note_keys(record, self.keys_path)
        done = record.step + 1
        clips_per_second = self.plan.samples_per_step * self.plan.repeats / float(seconds.max())
        progress.update(done, float(loss.mean()), clips_per_second)
        if not (record.metrics or record.metrics is None or self._is_due(done, self.plan.log_every)):
            return
        figures = {
            "loss": float(loss.mean()),
            "learning_rate": record.learning_rate,
            "gradient_norm": gradient_norm,
            "clips_per_second": clips_per_second,
            "data_wait_s": float(data_wait_s.mean()),
            "data_wait_max_s": float(data_wait_s.max()),
            "data_wait_share": float(data_wait_s.sum() / seconds.sum()),
            **loader_shares([float(cost.sum()) for cost in costs]),
            "memory_gib": float(memory.max()),
            "padded": self.samples_padded,
            "skipped": self.samples_skipped,
            **({"ema_decay": self.average.decay_at(done)} if self.average else {}),
            **({"quarantined": self.samples_quarantined} if self.samples_quarantined else {}),
            **(record.metrics or {}),
        }
        if record.metrics is None:
            self._unvalidated = figures
            return
        self._write(lambda: self.tracker.log(done, figures))

    def _write(self, action: Callable[[], None]) -> None:
        """Writes to the record on rank 0; where that fails, all ranks end together when they gather next."""
        if self._failure or not self.processes.is_main:
            return
        try:
            action()
        except (TubeletError, OSError) as error:
            self._failure = error

    def _sync_record(self) -> None:
        """Forces the record to the disk before a checkpoint, after which no attempt makes these lines anew."""
        for path in (self.tracker.path, self.skipped_path, self.keys_path):
            if path and path.exists():
                sync_file(path)

    def _end_if_failed(self, failed: Tensor) -> None:
        """Raises on every rank what rank 0 could not write."""

        def tell() -> None:
            if self._failure:
                raise self._failure

        if failed.any():
            self.saving.finish_before_the_end()
            self.processes.on_main_only(tell)

    def _check_before_saving(self, step: int) -> None:
        """Keeps what the last backward pass may have broken, which no loss has shown yet, out of checkpoints."""
        broken = not weights_are_finite(self.model, self.processes.rank)
        own = torch.tensor([broken, self._failure is not None], dtype=torch.float64)
        broken_ranks, failed = self.processes.gather(own).unbind(1)
        self._end_if_failed(failed)
        if broken_ranks.any():
            raise StoppedByRule(
                f"the weights after step {step} are not finite on {int(broken_ranks.sum())} of {self.processes.world} "
                f"ranks; checkpoints are untouched: lower optimizer.base_lr, or set optimizer.clip_grad"
            )

    def _stop_if_not_finite(self, record: _StepRecord, losses: Tensor) -> None:
        bad_ranks = (~losses.isfinite()).nonzero().flatten().tolist()
        if not bad_ranks:
            return
        keys = self.processes.gather_objects(record.keys)
        named = "; ".join(f"rank {rank}: {' '.join(keys[rank])}" for rank in bad_ranks)
        raise StoppedByRule(
            f"the loss of step {record.step + 1} is not finite on {len(bad_ranks)} of {self.processes.world} ranks "
            f"(samples of {named}); checkpoints are untouched: lower optimizer.base_lr, set optimizer.clip_grad, or "
            f"look at these samples"
        )

    def _note_skipped(self, record: _StepRecord) -> None:
        reports = [report for part in self.processes.gather_objects(record.skipped) for report in part]
        skipped, quarantined = count_skipped(reports)
        self.samples_skipped += skipped
        self.samples_quarantined += quarantined
        entries = [{"step": record.step + 1} | report for report in reports]
        self._write(lambda: append_json_lines(self.skipped_path, entries))
        if self.samples_skipped > max(FEW_SAMPLES, self.plan.max_bad_share * self.samples_read):
            raise StoppedByRule(
                f"{self.samples_skipped} of {self.samples_read} samples could not be decoded, more than "
                f"data.max_bad_share {self.plan.max_bad_share} allows; they are listed in {self.skipped_path}"
            )

    def _note_keys(self, record: _StepRecord, path: Path) -> None:
        keys = [key for part in self.processes.gather_objects(record.keys) for key in part]
        self._write(lambda: append_json_lines(path, [{"step": record.step + 1, "keys": keys}]))

    def _checks_due(self, done: int) -> list[Check]:
        return [check for check in self.checks if check.is_due(done, self.plan.steps)]

    def _measure_unless_stopped(self, checks: list[Check]) -> Figures | None:
        """Returns the figures of checks, or None where there are some and the run was told to stop instead."""
        if not checks:
            return {}
        if self._cause:
            return None
        try:
            return self._measure(checks)
        except Preempted:
            return None

    def _measure(self, checks: list[Check]) -> Figures:
        """Returns the figures of checks; raises `Preempted` once the run is told to stop."""
        first = self.plan.first_step
        saved = f"after step {first}, which is saved" if first else "before its first step"
        self.model.eval()
        hook = self.stop.abandon_forward(self.model, self.processes, saved)
        figures: Figures = {}
        try:
            with torch.no_grad(), self.average.shown_by(self.model) if self.average else contextlib.nullcontext():
                for check in checks:
                    self.watchdog.expect(check.name, slow=True)
                    figures |= check.measure(self.model)
        finally:
            hook.remove()
        return figures

    def _judge(self, checks: list[Check], done: int, figures: Figures | None) -> None:
        """Ends the run where a check finds that it is worth no more steps; no judgement without figures."""
        for check in checks if figures is not None else ():
            check.judge(done, figures or {})
