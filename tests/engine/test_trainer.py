"""Rules that stop a run: a loss or weights that are not finite, too many samples that cannot be decoded."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from launch.cli import main
from pretrain.commandline import find_recipe
from pretrain.data.loader import Batch, MicroBatches
from pretrain.data.order import Order
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import Costs
from pretrain.engine.checkpoint import CheckpointConfig, Checkpoints, engine_kind
from pretrain.engine.checkpoint_search import find_checkpoint, step_folders
from pretrain.engine.checks import Check
from pretrain.engine.distributed import Processes
from pretrain.engine.draws import seed_draws
from pretrain.engine.optimizer import OptimizerConfig
from pretrain.engine.ownership import RunLock
from pretrain.engine.schedule import build_schedule
from pretrain.engine.step_figures import weights_are_finite
from pretrain.engine.tracking import Tracker, read_metrics
from pretrain.engine.trainer import Plan, Trainer
from pretrain.errors import DiskFull, Preempted, StoppedByRule
from tests.runs import run, tiny_pretraining

ABSURD = ["--optimizer.base_lr", "1e30", "--optimizer.warmup_steps", "0", "--steps", "6", "--checkpoint.every", "1"]


@pytest.fixture(scope="module")
def recipe(packed_shards, tmp_path_factory) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)


def keys_of_step(shards: ShardSet, step: int, world: int, rank: int) -> list[str]:
    """Returns the samples of a step, counted from 1 as the record does, in the order of a rank's micro-batches."""
    order = Order(shards.samples_per_shard, seed=0, lanes=2, shards_per_window=2, global_batch=4)
    batches = MicroBatches(order, range(step - 1, step), micro_batch=2, world=world, rank=rank)
    return [shards.key(request.sample) for batch in batches for request in batch]


def stopped_step(said: str) -> int:
    return int(re.search(r"the loss of step (\d+) is not finite", said)[1])


def test_a_loss_that_is_not_finite_stops_the_run_names_its_samples_and_leaves_checkpoints_alone(
    recipe, packed_shards, tmp_path, capsys
):
    out = tmp_path / "run"
    command = ["pretrain", "--config", str(recipe), "--out", str(out)]
    assert main([*command, *ABSURD]) == 3
    said = capsys.readouterr().err
    step = stopped_step(said)
    keys = " ".join(keys_of_step(ShardSet.open(packed_shards), step, world=1, rank=0))
    assert f"not finite on 1 of 1 ranks (samples of rank 0: {keys}); checkpoints are untouched" in said
    assert "Traceback" not in said
    assert find_checkpoint(out / "checkpoints", "auto").step == step - 1
    assert [entry["step"] for entry in read_metrics(out / "metrics.jsonl")] == list(range(1, step))
    outcome = json.loads((out / "outcome.json").read_text())
    assert outcome["exit_code"] == 3
    assert f"the loss of step {step} is not finite" in outcome["reason"]


def test_every_rank_whose_loss_is_not_finite_is_named_with_its_own_samples(recipe, packed_shards, tmp_path):
    started = run("pretrain", ["--config", recipe, "--out", tmp_path / "run", *ABSURD], tmp_path, world=2)
    assert started.codes == [3, 3], started.text
    step = stopped_step(started.text)
    shards = ShardSet.open(packed_shards)
    named = [f"rank {rank}: {' '.join(keys_of_step(shards, step, 2, rank))}" for rank in (0, 1)]
    assert f"is not finite on 2 of 2 ranks (samples of {'; '.join(named)})" in started.text
    assert started.text.count("tubelet: ") == 1
    assert "tubelet: " not in started.outputs[1].read_text()


def test_too_many_samples_that_cannot_be_decoded_stop_the_run_and_are_listed(recipe, packed_shards, tmp_path, capsys):
    folder = Path(shutil.copytree(packed_shards, tmp_path / "shards"))
    shards = ShardSet.open(folder)
    bad = [0, 3, 5, 6, 9]
    for number in bad:
        shard, place = shards.locate(number)
        with open(folder / shards.shards[shard].name, "r+b") as file:
            file.seek(shards.shard_index(shard).video_offsets[place] + 60)
            file.write(b"damage")
    out = tmp_path / "run"
    command = ["pretrain", "--config", str(recipe), "--out", str(out), "--data.shards", str(folder), "--steps", "40"]
    assert main(command) == 3
    said = capsys.readouterr().err
    found = re.search(r"(\d+) of (\d+) samples could not be decoded, more than data.max_bad_share 0.01 allows", said)
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert int(found[1]) == len(skipped) > 10
    assert int(found[2]) == 4 * skipped[-1]["step"]
    assert {entry["key"] for entry in skipped} <= {shards.key(number) for number in bad}
    assert all("its checksum differs" in entry["reason"] for entry in skipped)


def trainer_of(
    out: Path, processes: Processes, objective, checkpoint_every: int = 1, background: bool = False
) -> Trainer:
    """A trainer of one small layer for three steps."""
    plan = Plan(
        samples_read=0,
        first_step=0,
        samples_padded=0,
        steps=3,
        accumulation=1,
        samples_per_step=1,
        repeats=1,
        seed=0,
        clip_grad=None,
        log_every=1,
        checkpoint_every=checkpoint_every,
        max_bad_share=1.0,
    )
    layer = torch.nn.Linear(2, 2)
    model, optimizer = processes.prepare(layer, torch.optim.AdamW(layer.parameters()))
    schedule = build_schedule(optimizer, OptimizerConfig(), 1, 0, plan.steps)
    checkpoints = Checkpoints(
        out / "checkpoints", processes, RunLock(out), CheckpointConfig(keep_last=3, background=background)
    )
    tracker = Tracker(out, "none", {}, "pretrain")
    state = {"engine": engine_kind(processes)}
    return Trainer(
        plan, processes, model, optimizer, schedule, objective, checkpoints, tracker, out / "skipped.jsonl", state
    )


def batches(skipped: list[dict]) -> list[Batch]:
    return [Batch(*[torch.zeros(1, 2)] * 4, keys=["a"], padded=0, skipped=skipped)] * 3


def test_a_step_reads_no_value_from_the_device(tmp_path):
    """Fake tensors have no values: forward, loss, backward, clipping and update must do without until it is settled."""
    with Processes() as processes:
        trainer = trainer_of(tmp_path, processes, lambda model, batch: model(batch.clips).square().mean())
        trainer.plan = dataclasses.replace(trainer.plan, clip_grad=1.0)
        with FakeTensorMode() as fake:
            for group in trainer.optimizer.param_groups:
                group["params"] = [fake.from_tensor(parameter) for parameter in group["params"]]
            weight, bias = trainer.optimizer.param_groups[0]["params"]
            trainer.model._parameters.update(weight=weight, bias=bias)
            record = trainer._step(0, iter(batches([])))
            with pytest.raises(DataDependentOutputException):
                record.loss_and_norm()


def test_the_record_is_on_the_disk_before_the_checkpoint_after_which_no_line_of_it_is_made_anew(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append(Path(os.readlink(f"/proc/self/fd/{file}"))), sync(file))
    )
    with Processes() as processes:
        trainer = trainer_of(tmp_path, processes, lambda model, batch: model(batch.clips).square().mean())
        trainer.train(batches([]), "test")
    names = [path.name.partition(".tmp-")[0] for path in synced]
    names = [name for name in names if name in ("metrics.jsonl", "manifest.json")]
    assert names == ["metrics.jsonl", "manifest.json"] * 3


def test_weights_that_the_last_backward_pass_broke_are_never_saved_though_no_loss_shows_it_yet(tmp_path):
    calls = itertools.count(1)

    def objective(model, batch):
        loss = model(batch.clips).square().sum()
        return (loss * 0).sqrt() if next(calls) == 2 else loss  # 0, with a gradient that is not a number

    with Processes() as processes:
        trainer = trainer_of(tmp_path, processes, objective)
        with pytest.raises(StoppedByRule, match="the weights after step 2 are not finite on 1 of 1 ranks; checkpoints"):
            trainer.train(batches([]), "test")
    assert find_checkpoint(tmp_path / "checkpoints", "auto").step == 1
    assert [entry["loss"] for entry in read_metrics(tmp_path / "metrics.jsonl")][1] == 0.0


def not_finite(trainer: Trainer) -> torch.Tensor:
    return trainer.model.weight.sum() * math.nan


def no_room_for_the_record(trainer: Trainer) -> torch.Tensor:
    trainer._failure = DiskFull("metrics.jsonl: no space left on the disk")
    return trainer.model.weight.sum()


def told_to_stop(trainer: Trainer) -> torch.Tensor:
    trainer.stop._signal = signal.SIGUSR2
    return trainer.model.weight.sum()


def bug(trainer: Trainer) -> torch.Tensor:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("third_step", "error", "saved"),
    [
        (not_finite, StoppedByRule, [1, 2]),
        (no_room_for_the_record, DiskFull, [1, 2]),
        (told_to_stop, Preempted, [1, 2, 3]),
        (bug, ZeroDivisionError, [1, 2]),
    ],
)
def test_whatever_ends_a_run_commits_first_what_is_written_beside_training(tmp_path, third_step, error, saved):
    """Every step saves, so that each ending is met while the checkpoint of the step before is in flight."""
    calls = itertools.count(1)

    def objective(model, batch):
        return model(batch.clips).sum() if next(calls) < 3 else third_step(trainer)

    with Processes() as processes:
        trainer = trainer_of(tmp_path, processes, objective, background=True)
        with pytest.raises(error):
            trainer.train(batches([]), "test")
    assert [int(folder.name[-8:]) for folder in step_folders(tmp_path / "checkpoints")] == saved


def test_the_part_of_a_weight_that_zero_3_leaves_on_a_rank_is_looked_at_without_its_padding():
    with Processes(deepspeed=find_recipe("zero3", "deepspeed", ".json")) as processes:
        layer = torch.nn.Linear(3, 1)
        model, _ = processes.prepare(layer, torch.optim.AdamW(layer.parameters()))
        assert weights_are_finite(model, rank=0)
        part = next(iter(model.parameters())).ds_tensor
        part.data[-1] = torch.nan
        assert not weights_are_finite(model, rank=0)
        assert weights_are_finite(model, rank=1)  # to whom all of this part would be padding


@pytest.mark.parametrize("name", ["metrics.jsonl", "skipped.jsonl"])
def test_a_disk_that_is_full_for_the_record_ends_the_run_before_the_next_checkpoint(tmp_path, name):
    with Processes() as processes:
        trainer = trainer_of(tmp_path, processes, lambda model, batch: model(batch.clips).sum(), checkpoint_every=3)
        (tmp_path / name).symlink_to("/dev/full")
        with pytest.raises((DiskFull, OSError), match=r"[Nn]o space left"):
            trainer.train(batches([{"key": "a", "reason": "bad"}]), "test")
    assert find_checkpoint(tmp_path / "checkpoints", "auto") is None


def test_metrics_tell_what_starves_the_model_and_quarantined_samples_do_not_count_as_bad(tmp_path):
    skipped = [{"key": "a", "reason": "in quarantine", "quarantined": True}] * 30 + [{"key": "b", "reason": "bad"}]
    costs = Costs(read_s=1.0, decode_s=2.0, cut_s=1.0, cache_hits=3, cache_misses=1)
    with Processes() as processes:
        trainer = trainer_of(tmp_path, processes, lambda model, batch: model(batch.clips).sum(), checkpoint_every=3)
        trainer.plan = dataclasses.replace(trainer.plan, max_bad_share=0.0)
        trainer.train([batch._replace(costs=costs) for batch in batches(skipped)], "test")
        (tmp_path / "run.lock").unlink()
        again = trainer_of(tmp_path, processes, lambda model, batch: model(batch.clips).sum())
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [(entry["skipped"], entry["quarantined"]) for entry in entries] == [(1, 30), (2, 60), (3, 90)]
    assert (again.samples_skipped, again.samples_quarantined) == (3, 90), "from the run's own list"
    for entry in entries:
        assert (entry["read_share"], entry["decode_share"], entry["cache_hit_share"]) == (0.25, 0.5, 0.75)
        assert 0 <= entry["data_wait_share"] <= 1


def test_samples_padded_are_counted_over_the_whole_run_whatever_is_logged_and_wherever_it_resumed(
    recipe, packed_shards, tmp_path
):
    shards = ShardSet.open(packed_shards)
    order = Order(shards.samples_per_shard, seed=0, lanes=2, shards_per_window=2, global_batch=4)
    lengths = [frames for shard in range(len(shards.shards)) for frames in shards.shard_index(shard).frames]
    short = [sum(lengths[sample] < 16 for sample in order.step(step).samples) for step in range(6)]
    command = ["pretrain", "--config", str(recipe), "--out", str(tmp_path / "run"), "--data.clip.stride", "5"]
    options = ["--optimizer.warmup_steps", "0", "--log_every", "2", "--checkpoint.every", "1"]
    for steps in ("3", "6"):
        assert main([*command, *options, "--steps", steps]) == 0
    expected = [(step, sum(short[:step])) for step in (2, 3, 4, 6)]
    assert [(entry["step"], entry["padded"]) for entry in read_metrics(tmp_path / "run" / "metrics.jsonl")] == expected
    assert expected[-1][1] > max(short)


def test_the_draws_of_a_micro_batch_depend_on_nothing_but_its_place_in_the_run():
    def drawn(*place: int) -> tuple:
        seed_draws(*place)
        return tuple(torch.rand(4).tolist())

    places = [(seed, step, rank, micro) for seed in (0, 1) for step in (0, 1) for rank in (0, 1) for micro in (0, 1)]
    first = {place: drawn(*place) for place in places}
    assert len(set(first.values())) == len(places)
    assert all(drawn(*place) == first[place] for place in reversed(places))


def test_a_signal_in_a_validation_abandons_it_saves_and_the_next_attempt_owes_it_to_the_record(tmp_path):
    seen: list[str] = []

    def validation(model):
        for number in (1, 2):
            model(torch.zeros(1, 2))
            seen.append(f"batch {number}")
            if len(seen) == 1:
                os.kill(os.getpid(), signal.SIGUSR2)
                while not trainer.stop.code:
                    time.sleep(0.001)
        return {"validation_loss": 0.5}

    def trained(first_step: int, unvalidated: dict | None) -> Trainer:
        trainer = trainer_of(tmp_path, processes, lambda model, batch: model(batch.clips).sum(), checkpoint_every=3)
        lengths = {"first_step": first_step, "unvalidated": unvalidated}
        trainer.plan = dataclasses.replace(trainer.plan, **lengths)
        trainer.checks = [Check("a validation", 2, validation)]
        return trainer

    with Processes() as processes:
        trainer = trained(0, None)
        with trainer.stop, pytest.raises(Preempted, match=r"SIGUSR2 \(rank 0\): ended after step 2, which is saved"):
            trainer.train(batches([]), "test")
        saved = find_checkpoint(tmp_path / "checkpoints", "auto")
        assert (saved.step, seen) == (2, ["batch 1"])
        assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1]
        (tmp_path / "run.lock").unlink()
        trainer = trained(2, saved.state["unvalidated"])
        trainer.train(batches([])[2:], "test")
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [(entry["step"], entry.get("validation_loss")) for entry in entries] == [(1, None), (2, 0.5), (3, 0.5)]
    assert entries[1].keys() == entries[2].keys()
    assert find_checkpoint(tmp_path / "checkpoints", "auto").state["unvalidated"] is None


def test_a_check_before_training_is_logged_as_step_0_and_a_signal_in_it_leaves_nothing(tmp_path):
    def trained(out: Path, measure) -> Trainer:
        out.mkdir()
        trainer = trainer_of(out, processes, lambda model, batch: model(batch.clips).sum())
        trainer.checks = [Check("a probe", 2, measure, before_training=True, judge=lambda *told: judged.append(told))]
        return trainer

    def measure(model) -> dict[str, float]:
        assert not model.training
        return {"probe_knn": model(torch.zeros(1, 2)).sum().item() * 0}

    def stopped(model) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGUSR2)
        while not trainer.stop.code:
            time.sleep(0.001)
        return measure(model)

    judged: list[tuple] = []
    with Processes() as processes:
        trained(tmp_path / "whole", measure).train(batches([]), "test")
        trainer = trained(tmp_path / "stopped", stopped)
        with trainer.stop, pytest.raises(Preempted, match="ended before its first step"):
            trainer.train(batches([]), "test")
    entries = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3]
    assert [entry.get("probe_knn") for entry in entries] == [0.0, None, 0.0, 0.0]
    assert judged == [(step, {"probe_knn": 0.0}) for step in (0, 2, 3)]
    assert not (tmp_path / "stopped" / "metrics.jsonl").exists()
