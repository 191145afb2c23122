"""Two processes against one: the same samples, losses and checkpoints, with DeepSpeed's ZeRO and without."""

import os
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launch.cli import main
from pretrain.engine.checkpoint_search import step_folders
from pretrain.engine.manifest import verify
from pretrain.engine.tracking import read_metrics
from tests.runs import run, tiny_pretraining

STEPS = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, packed_shards) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)


def arguments(recipe: Path, out: Path, *more: object) -> list[str]:
    """A run whose model draws nothing, since what a model draws depends on the rank."""
    sizes = ["--data.global_batch", 8, "--encoder.drop_path", 0, "--steps", STEPS]
    return [str(part) for part in ("--config", recipe, "--out", out, *sizes, *more)]


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    """A run of one process, which accumulates twice as many micro-batches as each of two."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(["pretrain", *arguments(recipe, out)]) == 0
    return out


def assert_same_training(out: Path, alone: Path, norms: bool = True) -> None:
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (out, alone))
    assert [entry["step"] for entry in ours] == list(range(1, STEPS + 1))
    for name, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-4), ("learning_rate", 1e-12)):
        if name == "gradient_norm" and not norms:
            assert [entry[name] for entry in ours] == [None] * STEPS
            continue
        assert [entry[name] for entry in ours] == pytest.approx([entry[name] for entry in theirs], rel=tolerance), name
    weights, expected = (load_file(folder / "encoder" / "model.safetensors") for folder in (out, alone))
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert value.shape == expected[name].shape
        assert (value - expected[name]).abs().max() < 1e-3, name


@pytest.mark.parametrize(
    "options",
    [
        [],
        *(["--deepspeed", name] for name in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")),
    ],
    ids=lambda options: options[-1] if options else "plain",
)
def test_every_way_of_dividing_the_work_trains_alike_and_saves_a_checkpoint_that_verifies(
    recipe, alone, tmp_path, options
):
    out = tmp_path / "run"
    done = run("pretrain", arguments(recipe, out, *options), tmp_path, world=2)
    assert done.codes == [0, 0], done.text
    assert_same_training(out, alone, norms=options != ["--deepspeed", "zero0"])
    (folder,) = step_folders(out / "checkpoints")
    saved = verify(folder)
    assert saved.step == STEPS
    if "zero3" in options or "zero3_offload" in options:
        again = run("pretrain", arguments(recipe, out, *options, "--steps", STEPS + 1), tmp_path, world=2)
        assert again.codes == [0, 0], again.text
        assert f"going on from step {STEPS}" in again.text
        assert [entry["step"] for entry in read_metrics(out / "metrics.jsonl")] == list(range(1, STEPS + 2))


def test_a_plain_checkpoint_of_two_processes_is_continued_by_one_with_the_same_losses(recipe, tmp_path, capsys):
    two = tmp_path / "two"
    first = ["--steps", 6, "--checkpoint.every", 3]
    assert run("pretrain", arguments(recipe, two, *first), tmp_path, world=2).codes == [0, 0]
    newest = step_folders(two / "checkpoints")
    for path in (newest[-1] / "manifest.json", two / "summary.json"):  # as if the kill had come at step 3
        path.unlink()
    expected = [entry["loss"] for entry in read_metrics(two / "metrics.jsonl")]
    assert main(["pretrain", *arguments(recipe, two, *first)]) == 0
    assert "going on from step 3" in capsys.readouterr().err
    assert [entry["loss"] for entry in read_metrics(two / "metrics.jsonl")] == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_of_zero_is_refused_by_another_engine_and_leaves_no_trace_in_its_process(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    brief = arguments(recipe, out, "--optimizer.warmup_steps", 0)
    before = dict(os.environ)
    assert main(["pretrain", *brief, "--steps", "1", "--deepspeed", "zero2"]) == 0
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED"):
        assert os.environ.get(name) == before.get(name)
    capsys.readouterr()
    assert main(["pretrain", *brief, "--steps", "2"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"was written by DeepSpeed ZeRO 2 with 1 processes and cannot be read by plain data", said)


def test_bad_input_under_a_launcher_is_told_once_and_ends_every_rank_with_2(recipe, tmp_path):
    started = run("pretrain", arguments(recipe, tmp_path / "run", "--data.micro_batch", 3), tmp_path, world=2)
    assert started.codes == [2, 2]
    assert [output.read_text().count("\n") for output in started.outputs] == [1, 0]
    assert started.text.startswith("tubelet: data.micro_batch: 2 processes x 3 samples do not divide")
    assert not (tmp_path / "run").exists()
