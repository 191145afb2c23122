"""Pretraining under fire, in real processes: killed again and again, started twice, interrupted, started when done."""

import json
import random
import re
import signal
from pathlib import Path

import pytest

from pretrain.engine.tracking import read_metrics
from tests.runs import Started, run, start, tiny_pretraining

STEPS = 24
EVERY = 5
VARIANTS = {"one-process": (1, []), "zero2-of-two": (2, ["--deepspeed", "zero2"])}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, packed_shards) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)


def arguments(recipe: Path, out: Path, *more: object) -> list[object]:
    return ["--config", recipe, "--out", out, "--steps", STEPS, "--checkpoint.every", EVERY, *more]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in read_metrics(out / "metrics.jsonl")]


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def encoder(out: Path) -> bytes:
    return (out / "encoder" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module", params=VARIANTS)
def uninterrupted(request, recipe, tmp_path_factory) -> tuple[str, Path]:
    world, options = VARIANTS[request.param]
    out = tmp_path_factory.mktemp(request.param) / "run"
    done = run("pretrain", arguments(recipe, out, *options), out.parent, world=world)
    assert done.codes == [0] * world, done.text
    assert [step for step, _ in losses(out)] == list(range(1, STEPS + 1))
    return request.param, out


def test_a_run_killed_three_times_ends_with_the_very_weights_and_losses_of_one_that_was_not(
    uninterrupted, recipe, tmp_path
):
    variant, reference = uninterrupted
    world, options = VARIANTS[variant]
    out = tmp_path / "run"
    draw = random.Random()
    kills = sorted(draw.sample(range(EVERY + 1, STEPS), 3))
    resumed = []
    for kill in kills:
        going = start("pretrain", arguments(recipe, out, *options), tmp_path, world=world)
        going.wait_for(lambda kill=kill: lines(out) >= kill)
        going.kill()
        resumed += goes_on_from(going)
        assert not (out / "summary.json").exists(), "the run ended before it was killed"
    last = run("pretrain", arguments(recipe, out, *options), tmp_path, world=world)
    assert last.code == 0, f"kills at {kills}: {last.text}"
    resumed += goes_on_from(last)
    assert len(resumed) == 3, f"kills at {kills} were resumed at {resumed}"
    assert all(step % EVERY == 0 and step > 0 for step in resumed)
    assert losses(out) == losses(reference), f"kills at {kills}"
    assert encoder(out) == encoder(reference), f"kills at {kills}"
    assert json.loads((out / "outcome.json").read_text())["attempt"] == 4


def goes_on_from(started: Started) -> list[int]:
    return [int(step) for step in re.findall(r"going on from step (\d+)", started.text)]
