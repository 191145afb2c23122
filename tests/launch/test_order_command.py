"""`tubelet order`: it lists what a real run read, by the steps of the run's own files, and refuses what cannot be."""

import contextlib
import json
import os
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.data.shards import ShardSet
from tests.data.test_loader import rebuilt
from tests.runs import TINY, tiny_pretraining

pytestmark = pytest.mark.xdist_group("order command")  # one worker, which makes once what these tests share

BAD = (2, 7)  # sample numbers


@pytest.fixture(scope="module")
def shards(packed_shards, tmp_path_factory) -> ShardSet:
    """A set in which two samples cannot be decoded."""
    folder = tmp_path_factory.mktemp("order") / "shards"
    rebuilt(packed_shards, folder, lambda number, sample: b"no video" * 9 if number in BAD else sample.video)
    return ShardSet.open(folder)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """A pretraining run of 6 steps that met the bad samples."""
    folder = tmp_path_factory.mktemp("run")
    recipe = tiny_pretraining(folder, shards.folder)
    options = ["--steps", "6", "--seed", "3", "--data.workers", "1", "--data.repeats", "2"]
    assert main(["pretrain", "--config", str(recipe), "--out", str(folder / "run"), *options]) == 0
    return folder / "run"


def listed(capsys, *arguments: object) -> list[dict]:
    capsys.readouterr()
    assert main(["order", *map(str, arguments)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_run_s_own_configuration_lists_the_samples_that_the_run_met(shards, run, capsys):
    skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    bad_keys = {shards.key(number) for number in BAD}
    met = {(entry["step"], entry["epoch"], entry["key"]) for entry in skipped}
    lines = listed(capsys, "--config", run / "config.yaml", "--steps", "1:6")
    assert len(lines) == 6 * 4 * 2
    assert {line["step"] for line in lines} == set(range(1, 7))
    expected = {(line["step"], line["epoch"], line["key"]) for line in lines if line["key"] in bad_keys}
    assert expected <= met, "substitutes may be bad too"
    positions = {(entry["step"], entry["position"] % 4) for entry in skipped}
    assert positions == {(line["step"], line["place"]) for line in lines if line["key"] in bad_keys}
    assert len(positions) > 2
    assert list(lines[0]) == [
        "step",
        "place",
        "rank",
        "worker",
        "set",
        "epoch",
        "key",
        "repeat",
        "clip_start",
        "mask_seed",
    ]
    assert {line["worker"] for line in lines} == {0}


def test_world_and_workers_change_only_who_reads(run, capsys):
    whole = listed(capsys, "--config", run / "config.yaml", "--steps", "2:3")
    divided = listed(
        capsys, f"--config={run / 'config.yaml'}", "--steps=2:3", "--world", "2", "--workers", "3", "--resumed-at", "1"
    )
    assert [(line["step"], line["rank"], line["worker"]) for line in divided[::4]] == [
        (2, 0, 0), (2, 1, 0), (3, 0, 1), (3, 1, 1)
    ]  # fmt: skip
    for line in (*whole, *divided):
        del line["rank"], line["worker"]
    assert divided == whole


def test_a_recipe_and_a_finetuning_run_are_listed_too(packed_shards, tmp_path, capsys):
    fields = ["--data.shards", packed_shards, "--data.global-batch", "8", "--data.micro-batch", "4"]
    lines = listed(capsys, "--config", "demo", *fields, "--steps", "1100:1100")
    assert len(lines) == 16
    assert len({line["mask_seed"] for line in lines}) == 16
    finetuning = tmp_path / "config.yaml"
    finetuning.write_text(TINY + "encoder: runs/none\nhead: {pool: mean}\nsteps: 9\n")
    lines = listed(capsys, "--config", finetuning, "--data.shards", packed_shards, "--steps", "9:9")
    assert [line["place"] for line in lines] == [0, 2, 1, 3]
    assert {line["mask_seed"] for line in lines} == {None}


def test_a_pipe_that_closes_early_is_no_error(run, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, contextlib.redirect_stdout(closed):
        assert main(["order", "--config", str(run / "config.yaml"), "--steps", "1:6"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "1:7"], "--steps: 7 is past the end of the run, which has 6 steps; end at 6 or before"),
        (["--steps", "0:3"], "--steps: 0:3 holds no step; steps count from 1, as in metrics.jsonl"),
        (["--steps", "4:3"], "--steps: 4:3 holds no step"),
        (["--steps", "4"], "--steps: 4 is not A:B; give the first and the last step"),
        (["--world", "3"], "data.global_batch: 4 samples do not divide among 3 processes; use 6"),
        (["--world", "4"], "data.micro_batch: 4 processes x 2 samples do not divide data.global_batch 4; use 1"),
        (["--world", "0"], "--world: 0 must be at least 1"),
        (["--world", "two"], "order: argument --world: invalid int value: 'two'"),
        (["--workers", "-1"], "data.workers: -1 must not be negative"),
        (["--workers", "some"], "data.workers: expected int"),
        (["--resumed-at", "2"], "--resumed-at: 2 must be at least 0 and before step 2"),
        (["--data.lanes", "3"], "data.lanes: 3 lanes do not divide data.global_batch 4; use 2"),
        (["--data.shards", "/nowhere"], "data.shards: /nowhere: no such folder"),
        (["--data.shrads", "x"], "data.shrads: there is no such field; did you mean data.shards?"),
        (["--config", "videomae_x"], "videomae_x: is no file and no recipe of configs/pretrain; did you mean"),
        (["--steps"], "order: argument --steps: expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_list_that_cannot_be_is_refused_in_one_line(run, capsys, options, message):
    capsys.readouterr()
    assert main(["order", "--config", str(run / "config.yaml"), "--steps", "2:3", *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith(f"tubelet: {message}")


def test_a_recipe_without_a_length_is_refused(packed_shards, tmp_path, capsys):
    recipe = tiny_pretraining(tmp_path, packed_shards)
    assert main(["order", "--config", str(recipe), "--steps", "1:2"]) == 2
    assert "gives the run no length; take the run's own config.yaml, or give --epochs" in capsys.readouterr().err
