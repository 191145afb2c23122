"""Runs killed with `kill -9` and resumed by other worlds with other workers: the same samples in the same steps."""

import json
import random
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.data.pack import PackConfig, pack
from pretrain.data.shards import ShardSet
from pretrain.engine.tracking import read_metrics
from tests.runs import run, start, tiny_pretraining
from tests.videos import make_video

STEPS = 20
EVERY = 4
ATTEMPTS = ((2, 0), (2, 1), (1, 2), (4, 0))
"""Processes, and workers of each of them, in one attempt after the other; all but the last are killed."""
SEED = 11
GOES_ON = "going on from step "


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Shards of 43 videos, 5 steps an epoch, with a damaged one that has a substitute wherever it stands."""
    folder = tmp_path_factory.mktemp("worlds")
    for number in range(43):
        name = f"{'rare' if number % 7 == 0 else 'common'}/{number}.mp4"
        make_video(folder / "videos" / name, frames=5 + number % 9, height=32, width=32, seed=number)
    pack(PackConfig(source=str(folder / "videos"), out=str(folder / "shards"), samples_per_shard=6, jobs=1))
    opened = ShardSet.open(folder / "shards")
    with open(opened.folder / opened.shards[2].name, "r+b") as file:
        file.seek(opened.shard_index(2).video_offsets[3] + 50)
        file.write(b"damage")
    return opened.folder


def arguments(recipe: Path, out: Path, *more: object) -> list[object]:
    """A run whose model draws nothing, since what a model draws depends on the rank."""
    sizes = ["--data.global_batch", 8, "--data.lanes", 4, "--encoder.drop_path", 0, "--log_keys", "true"]
    cadence = ["--steps", STEPS, "--checkpoint.every", EVERY, "--data.max_bad_share", 0.5]
    return ["--config", recipe, "--out", out, *sizes, *cadence, *more]


def keys(out: Path) -> list[tuple[int, list[str]]]:
    """What the run's record says that it read: steps, and the keys of their samples in rank order."""
    return [(entry["step"], entry["keys"]) for entry in read_metrics(out / "keys.jsonl")]


def test_a_run_killed_and_resumed_by_other_worlds_reads_the_same_samples_in_the_same_steps(shards, tmp_path):
    recipe = tiny_pretraining(tmp_path, shards)
    reference, out = tmp_path / "undisturbed", tmp_path / "killed"
    assert run("pretrain", arguments(recipe, reference), tmp_path).code == 0
    expected = keys(reference)
    assert [(step, len(read)) for step, read in expected] == [(step, 8) for step in range(1, STEPS + 1)]
    chosen = random.Random(SEED)
    resumed = []
    for number, (world, workers) in enumerate(ATTEMPTS):
        command = arguments(recipe, out, "--data.workers", workers)
        if number == len(ATTEMPTS) - 1:
            going = run("pretrain", command, tmp_path, world=world)
            assert going.codes == [0] * world, going.text
        else:
            kill = EVERY * (number + 1) + chosen.randrange(1, EVERY + 1)
            going = start("pretrain", command, tmp_path, world=world)
            # An attempt that was killed may have written more lines than the next one waits for.
            going.wait_for(lambda: (not resumed or GOES_ON in going.text) and len(keys(out)) >= kill)  # noqa: B023
            going.kill()
            assert not (out / "summary.json").exists(), "the run ended before it was killed"
        resumed.append(int(going.text.partition(GOES_ON)[2].split(" ")[0] or 0))
        read = keys(out)
        assert read == expected[: len(read)], f"attempt {number + 1} by {world} processes with {workers} workers"
    assert len(read) == STEPS
    assert resumed[0] == 0
    assert all(resumed[1:]), f"attempts went on from steps {resumed}"
    losses = [[entry["loss"] for entry in read_metrics(folder / "metrics.jsonl")] for folder in (out, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    skipped = [(folder / "skipped.jsonl").read_text() for folder in (out, reference)]
    assert sorted(skipped[0].splitlines()) == sorted(skipped[1].splitlines()) != []


def test_the_keys_of_a_step_are_those_that_the_order_lists(shards, tmp_path, capsys):
    recipe, out = tiny_pretraining(tmp_path, shards), tmp_path / "run"
    assert main(["pretrain", *map(str, arguments(recipe, out, "--steps", 6))]) == 0
    capsys.readouterr()
    assert main(["order", "--config", str(out / "config.yaml"), "--steps", "1:6", "--world", "2"]) == 0
    listed: dict[int, list[str]] = {}
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        listed.setdefault(line["step"], []).append(line["key"])
    damaged = ShardSet.open(shards).shard_index(2).keys[3]
    for step, read in keys(out):
        assert [ours for ours in zip(read, listed[step], strict=True) if ours[0] != ours[1] != damaged] == []
        assert damaged not in read
    assert any(damaged in one for one in listed.values())


def test_a_run_logs_no_keys_unless_it_is_asked_to(shards, tmp_path):
    recipe, out = tiny_pretraining(tmp_path, shards), tmp_path / "run"
    assert main(["pretrain", *map(str, arguments(recipe, out, "--steps", 4, "--log_keys", "false"))]) == 0
    assert not (out / "keys.jsonl").exists()
