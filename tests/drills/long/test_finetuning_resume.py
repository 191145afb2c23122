"""Finetuning with all that draws or remembers, killed and started again: the same weights and averages to the bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.engine.averaging import AVERAGE
from pretrain.engine.tracking import read_metrics
from tests.drills.test_resume import goes_on_from, lines
from tests.runs import TINY, TINY_ENCODER, run, start

STEPS, EVERY = 12, 4
ADAPTERS = ["--lora.rank", 4, "--lora.dropout", 0.2]
VARIANTS = {
    "one-process": (1, []),
    "zero1-of-two": (2, ["--deepspeed", "zero1"]),
    "zero2-of-two": (2, ["--deepspeed", "zero2"]),
    "adapters": (1, ADAPTERS),
    "adapters-zero2-of-two": (2, [*ADAPTERS, "--deepspeed", "zero2"]),
}
FILES = (
    f"checkpoints/step-{STEPS:08d}/{AVERAGE}",
    "model/model.safetensors",
    "evaluation.json",
)
WHOLE_RECIPE = f"""
steps: {STEPS}
drop_path: 0.3
head: {{pool: mean, dropout: 0.2}}
mixing: {{mixup: 0.8, cutmix: 1.0, label_smoothing: 0.1}}
ema: {{decay: 0.9, warmup: true}}
architecture: {TINY_ENCODER.replace(", drop_path: 0.2", "")}
checkpoint: {{every: {EVERY}, background: true}}
validation: {{every: 5}}
"""
AUGMENTED = """
  repeats: 2
  time_windows: own
  augment: {rand_augment: rand-m7-n4-mstd0.5-inc1, colour_jitter: 0.5, grey: 0.2, erasing: 0.25}
"""


@pytest.fixture(scope="module")
def recipe(packed_shards, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "whole.yaml"
    data = f"data:\n  shards: {packed_shards}{AUGMENTED}".rstrip()
    tiny = TINY.replace("data:", data).replace("stride: 1, size: 16", "stride: 1, size: 16, flip: true")
    path.write_text(tiny + WHOLE_RECIPE)
    return path


@pytest.fixture(scope="module")
def first(recipe, packed_shards, tmp_path_factory) -> Path:
    """A short run, whose encoder others start from."""
    folder = tmp_path_factory.mktemp("first")
    done = run("finetune", [*arguments(recipe, packed_shards, folder / "run"), "--steps", EVERY], folder)
    assert done.code == 0, done.text
    return folder / "run"


def arguments(recipe: Path, packed_shards: Path, out: Path, *more: object) -> list[object]:
    return ["--config", recipe, "--validation.shards", packed_shards, "--out", out, *more]


def record(out: Path) -> list[tuple]:
    kept = ("step", "loss", "gradient_norm", "learning_rate", "ema_decay", "validation_top1")
    return [tuple(entry.get(name) for name in kept) for entry in read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_finetuning_ends_with_the_weights_and_averages_of_one_that_was_not(
    variant, recipe, packed_shards, first, tmp_path
):
    world, options = VARIANTS[variant]
    if "--lora.rank" in options:
        options = [*options, "--encoder", first]
    reference, out = tmp_path / "reference", tmp_path / "run"
    done = run("finetune", arguments(recipe, packed_shards, reference, *options), tmp_path, world=world)
    assert done.codes == [0] * world, done.text
    resumed = []
    for kill in (EVERY + 2, 2 * EVERY + 2):
        going = start("finetune", arguments(recipe, packed_shards, out, *options), tmp_path, world=world)
        going.wait_for(lambda: (kill < 2 * EVERY or goes_on_from(going)) and lines(out) >= kill)  # noqa: B023
        going.kill()
        resumed += goes_on_from(going)
    last = run("finetune", arguments(recipe, packed_shards, out, *options), tmp_path, world=world)
    assert last.codes == [0] * world, last.text
    resumed += goes_on_from(last)
    assert len(resumed) == 2, resumed
    assert record(out) == record(reference)
    for name in FILES:
        assert (out / name).read_bytes() == (reference / name).read_bytes(), name


@pytest.mark.parametrize("options", [[], ["--deepspeed", "zero2"]], ids=["plain", "zero2"])
def test_two_processes_hand_their_average_to_one_and_back(options, recipe, packed_shards, tmp_path):
    """Mixup and drop path draw by rank, so the runs differ from one of two processes alone; the average does not."""
    out = tmp_path / "run"
    for world, steps in ((2, EVERY), (1, 2 * EVERY), (2, STEPS)):
        more = [*options, "--steps", steps, "--checkpoint.keep_last", 9, "--checkpoint.every", 1]
        done = run("finetune", arguments(recipe, packed_shards, out, *more), tmp_path, world=world)
        assert done.codes == [0] * world, done.text
    checkpoints = out / "checkpoints"
    before = load_file(checkpoints / f"step-{EVERY:08d}" / AVERAGE)
    for step in range(EVERY + 1, STEPS + 1):
        after = load_file(checkpoints / f"step-{step:08d}" / AVERAGE)
        kept = min(1 - step ** (-2 / 3), 0.9)
        if not options:
            now = load_file(checkpoints / f"step-{step:08d}" / "model.safetensors")
            for name, value in after.items():
                assert torch.allclose(value, kept * before[name] + (1 - kept) * now[name], atol=1e-6)
        assert after.keys() == before.keys()
        before = after
    exported = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(value, exported[name]) for name, value in before.items())


def test_frozen_layers_stay_through_zero_2_of_two_processes_and_of_one(recipe, packed_shards, first, tmp_path):
    frozen = ["--encoder", first, "--freeze", 1, "--deepspeed", "zero2"]
    for world, steps in ((2, EVERY), (1, STEPS)):
        more = arguments(recipe, packed_shards, tmp_path / "run", *frozen, "--steps", steps)
        done = run("finetune", more, tmp_path, world=world)
        assert done.codes == [0] * world, done.text
    before, after = (load_file(out / "model" / "model.safetensors") for out in (first, tmp_path / "run"))
    stays = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert stays == {name for name in before if name.startswith("encoder.embedding.")}


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_adapters_learn_under_zero_what_they_learn_without_and_go_on_in_another_world(
    zero, recipe, packed_shards, first, tmp_path
):
    adapters = [*ADAPTERS, "--encoder", first, "--ema.decay", "null", "--ema.warmup", "false"]
    for name, options in (("plain", []), (zero, ["--deepspeed", zero])):
        more = arguments(recipe, packed_shards, tmp_path / name, *adapters, *options, "--steps", EVERY)
        done = run("finetune", more, tmp_path, world=2)
        assert done.codes == [0, 0], done.text
    plain, divided = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("plain", zero))
    assert {name: value.shape for name, value in divided.items()} == {name: v.shape for name, v in plain.items()}
    assert all(torch.allclose(value, plain[name], atol=1e-5) for name, value in divided.items())
    more = arguments(recipe, packed_shards, tmp_path / zero, *adapters, "--deepspeed", zero, "--steps", 2 * EVERY)
    done = run("finetune", more, tmp_path)
    assert done.code == 0, done.text
    after = load_file(tmp_path / zero / "model" / "model.safetensors")
    changed = {name for name, value in divided.items() if not torch.equal(value, after[name])}
    assert {name for name in changed if name.startswith("encoder.")} == {
        f"encoder.blocks.0.attention.{layer}.weight" for layer in ("qkv", "projection")
    }
