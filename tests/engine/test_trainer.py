"""Rules that stop a run: a loss that is not finite, too many samples that cannot be decoded."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from launch.cli import main
from pretrain.data.loader import MicroBatches
from pretrain.data.order import Order
from pretrain.data.shards import ShardSet
from pretrain.engine.checkpoint import find_checkpoint
from pretrain.engine.tracking import read_metrics
from pretrain.engine.trainer import seed_draws
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


def test_the_draws_of_a_micro_batch_depend_on_nothing_but_its_place_in_the_run():
    def drawn(*place: int) -> tuple:
        seed_draws(*place)
        return tuple(torch.rand(4).tolist())

    places = [(seed, step, rank, micro) for seed in (0, 1) for step in (0, 1) for rank in (0, 1) for micro in (0, 1)]
    first = {place: drawn(*place) for place in places}
    assert len(set(first.values())) == len(places)
    assert all(drawn(*place) == first[place] for place in reversed(places))
