"""Finetuning with balanced classes: the run reads what is listed, resumes to the bit, and refuses what cannot be."""

import collections
import json
import re
import shutil
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.data.shards import ShardSet
from tests.runs import tiny_pretraining
from tests.videos import make_video

pytestmark = pytest.mark.xdist_group("balanced runs")  # one worker, which makes once what these tests share

STEPS = "8"


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory) -> Path:
    """Shards of 9 runs and 2 jumps."""
    folder = tmp_path_factory.mktemp("imbalanced")
    for number in range(11):
        make_video(folder / "videos" / ("jump" if number > 8 else "run") / f"{number}.mp4", frames=8, seed=number)
    assert main(["pack", "--jobs=1", "--short-side", "32", str(folder / "videos"), str(folder / "shards")]) == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def command(finetuning, imbalanced) -> list[str]:
    balanced = ["--data.shards", imbalanced, "--data.class_power", "0", "--steps", STEPS, "--checkpoint.every", "4"]
    return [*finetuning, *map(str, balanced)]


@pytest.fixture(scope="module")
def balanced(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("balanced") / "run"
    assert main([*command, "--out", str(out)]) == 0
    return out


def refusal(capsys, command: list[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tubelet: ")]
    assert len(said) == 1
    return said[0]


def test_the_list_of_a_run_holds_as_many_clips_of_a_rare_class_in_every_step(balanced, imbalanced, capsys):
    capsys.readouterr()
    assert main(["order", "--config", str(balanced / "config.yaml"), "--steps", f"1:{STEPS}", "--world", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    shards = ShardSet.open(imbalanced)
    labels = {shards.key(number): label for number, label in enumerate(shards.labels())}
    by_step = collections.Counter((line["step"], labels[line["key"]]) for line in lines)
    assert by_step == {(step, label): 2 for step in range(1, int(STEPS) + 1) for label in (0, 1)}
    assert {line["key"] for line in lines} == set(labels), "16 places of runs, of which there are 9"


def test_a_balanced_run_resumes_to_the_bit(balanced, command, tmp_path):
    out = Path(shutil.copytree(balanced, tmp_path / "run"))
    for name in ("checkpoints/step-00000008", "model"):
        shutil.rmtree(out / name)
    for name in ("summary.json", "evaluation.json"):
        (out / name).unlink()
    assert main([*command, "--out", str(out)]) == 0
    model = Path("model/model.safetensors")
    assert (out / model).read_bytes() == (balanced / model).read_bytes()


def test_the_balance_cannot_change_in_the_middle_of_a_run(balanced, command, tmp_path, capsys):
    out = str(shutil.copytree(balanced, tmp_path / "run"))
    for power in ("0.5", "1"):
        said = refusal(capsys, [*command, "--out", out, "--steps", "9", "--data.class_power", power])
        assert re.search(rf"data\.class_power: is {float(power)}, but .*step-00000008 was written with 0\.0; use", said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.class_power", "1.5"], "data.class_power: 1.5 must lie between 0 (all alike) and 1 (as stored)"),
        (["--data.class_power", "nan"], "data.class_power: expected float"),
        (["--data.class_power", "even"], "data.class_power: expected float"),
        (["--data.lanes", "3"], "data.lanes: 3 lanes do not divide data.global_batch 4; use 2"),
        (["--data.global_batch", "12"], "data.global_batch: 12 is more than the 11 samples of the shards; use at most"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_balance_that_cannot_be_is_refused_in_one_line(command, tmp_path, capsys, options, message):
    said = refusal(capsys, [*command, "--out", str(tmp_path / "run"), *options])
    assert said.startswith(f"tubelet: {message}")
    assert not (tmp_path / "run").exists()


def test_unlabelled_sets_and_mixtures_have_no_classes_to_balance(packed_shards, other_shards, tmp_path, capsys):
    recipe = tiny_pretraining(tmp_path, other_shards)
    command = ["pretrain", "--config", str(recipe), "--out", str(tmp_path / "run"), "--steps", "4"]
    said = refusal(capsys, [*command, "--data.class_power", "0.5"])
    assert f"data.class_power: 0.5 balances classes, but {other_shards} has no labels; pack it from" in said
    mixture = json.dumps({str(packed_shards): 1, str(other_shards): 1})
    said = refusal(capsys, [*command, "--data.class_power", "0.5", "--data.mixture", mixture])
    assert "data.class_power: 0.5 balances the classes of one labelled set, and data.mixture names several" in said
