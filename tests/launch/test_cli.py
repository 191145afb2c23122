"""The command line: what is wrong is one line on standard error and exit code 2; dashes do as well as underscores."""

import sys
from pathlib import Path

import pytest

from launch import cli
from launch.cli import main
from pretrain.data.shards import ShardSet
from tests.runs import tiny_pretraining
from tests.videos import make_video


@pytest.fixture(scope="module")
def recipe(packed_shards, tmp_path_factory) -> str:
    return str(tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards))


def refusal(capsys, *arguments: object) -> str:
    """Runs a command that must be refused; returns what it says."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    return said.err


PRETRAINING = [
    (["--encoder.widht", "32"], "encoder.widht: there is no such field; did you mean encoder.width?"),
    (["--step", "3"], "step: there is no such field; did you mean steps?"),
    (["--encoder.width", "wide"], "encoder.width: "),
    (["--steps", "many"], "steps: "),
    (["--mask.name", "cube"], "mask.name: "),
    (["--data.clip.mean", "[1, 2]"], "data.clip.mean: "),
    (["--data.shards", "/nowhere"], "/nowhere: no such folder; make it with `tubelet pack VIDEOS /nowhere`"),
    (["--data.shards", "null"], "data.shards: is missing"),
    (["--steps", "null"], "steps, epochs: give exactly one of them"),
    (["--epochs", "3"], "steps, epochs: give exactly one of them"),
    (["--steps", "0"], "steps, epochs: must be greater than 0"),
    (["--steps", "2"], "optimizer.warmup_epochs: the warm-up takes 3 steps of a run of 2"),
    (["--steps", "null", "--epochs", "inf"], "epochs"),
    (["--seed", "-1"], "seed: "),
    (["--data.decoder", "ffmpeg"], "data.decoder: "),
    (["--data.lanes", "3"], "data.lanes: 3 lanes do not divide data.global_batch 4; use 2"),
    (["--data.micro_batch", "3"], "data.micro_batch: 1 processes x 3 samples do not divide data.global_batch 4"),
    (["--data.global_batch", "64", "--data.lanes", "1"], "data.global_batch: 64 is more than the 11 samples"),
    (["--data.clip.frames", "5"], "data.clip.frames: 5 frames do not divide into tubelets of 2"),
    (["--data.clip.size", "20"], "data.clip.size: 20 pixels do not divide into tubelets of 8 x 8"),
    (
        ["--data.clip.frame_rate", "5", "--data.clip.stride", "1"],
        "data.clip: give exactly one of frame_rate and stride",
    ),
    (["--encoder.heads", "5"], "encoder.heads: 5 heads do not divide encoder.width 32"),
    (["--encoder.depth", "0"], "encoder.depth: 0 must be at least 1"),
    (["--decoder.heads", "0"], "decoder.heads: 0 must be at least 1"),
    (["--validation.samples", "0"], "validation.every, validation.samples: must be at least 1"),
    (["--encoder.name", "factorised_encoder"], "mask.name: the factorised_encoder encoder cannot take a random mask"),
    (["--mask.ratio", "0.01"], "mask.ratio: 0.01 of 2 x 2 x 2 tokens leaves 8 visible and 0 to reconstruct"),
    (["--mask.ratio", "1"], "mask.ratio: 1.0 must lie between 0 and 1"),
    (["--mask.block_slots", "1"], "mask.block_slots: a random mask (mask.name) has no blocks; leave it out"),
    (["--mask.name", "block", "--mask.block_aspect", "[2, 1]"], "mask.block_aspect: [2.0, 1.0] must be two numbers"),
    (["--mask.decoded_pattern", "running_cell"], "mask.decoded_pattern: a running_cell is a part of the masked tokens"),
    (["--deepspeed", "zero4"], "zero4: is no file and no recipe of configs/deepspeed; did you mean zero"),
    (["--init", "/nowhere"], "/nowhere: holds no encoder"),
    (["--precision", "fp8"], "precision: "),
    (["--checkpoint.every", "0"], "checkpoint.every: 0 must be at least 1"),
    (["--optimizer.base_lr", "nan"], "optimizer.base_lr: expected float"),
    (["--resume", "/nowhere"], "/nowhere: has no manifest.json"),
    (["--out"], "out"),
    (["stray"], "stray"),
]


@pytest.mark.parametrize(
    ("options", "message"), PRETRAINING, ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else ""
)
def test_a_pretraining_run_that_cannot_be_is_refused_in_one_line(recipe, tmp_path, capsys, options, message):
    out = tmp_path / "run"
    said = refusal(capsys, "pretrain", "--config", recipe, "--out", out, "--steps", 8, *options)
    assert said.startswith("tubelet: ")
    assert message in said
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["pretrian"], "pretrian: there is no such command; did you mean pretrain?"),
        (["zzz"], "zzz: there is no such command; the commands are pack, "),
        (["pretrain", "--config", "videomae_x"], "videomae_x: is no file and no recipe of configs/pretrain; did you"),
        (["pretrain", "--config=videomae_x"], "videomae_x: is no file and no recipe of configs/pretrain; did you"),
        (["finetune", "--config", "nothing-like-it"], "the recipes are "),
        (["finetune", "--steps", "3", "--data.shards", "/nowhere"], "data.clip: give exactly one of"),
        (["evaluate"], "model"),
        (["evaluate", "--model", "/nowhere", "--shards", "/nowhere"], "/nowhere: has no config.json"),
        (["evaluate", "--model", "/nowhere", "--shards", "/nowhere", "--micro-batch", "0"], "micro_batch, workers"),
        (["predict"], "predict: "),
        (["predict", "clip.mp4"], "predict: the following arguments are required: --model"),
        (["predict", "clip.mp4", "--modle", "x"], "predict: "),
        (["predict", "clip.mp4", "--model", "x", "--decoder", "y"], "--decoder: invalid choice: 'y'"),
        (["evaluate", "--model", "x", "--shards", "y", "--decoder", "ffmpeg"], "decoder: "),
        (["predict", "clip.mp4", "--model", "/nowhere"], "/nowhere: has no config.json"),
        (["pack", "/nowhere", "/tmp/never-written"], "/nowhere: no such folder"),
        (["pack", "/nowhere"], "SHARDS: missing; see tubelet pack --help"),
        (["index"], "TARS: missing; see tubelet index --help"),
        (["pack", "a", "b", "--fps", "many"], "fps: expected float, got many"),
        (["pack", "a", "b", "--config", sys.executable], "config: not a YAML file ("),
        (["merge", __file__], f"{__file__}: holds no pack.json, so no pack was begun there"),
        (["pack", "a", "b", "c"], "c: is one folder too many; give VIDEOS and SHARDS"),
        (["pack", "/nowhere", "/tmp/never-written", "--short-sied", "3"], "did you mean short_side?"),
        (["pack", "/nowhere", "/tmp/never-written", "--short-side", "33"], "short_side: 33 does not do"),
        (["pack", "/tmp", "/tmp/never-written", "--annotations", "/nowhere.csv"], "/nowhere.csv: no such file"),
        (["pack", "/tmp", "/tmp/never-written", "--segment-s", "0"], "segment_s: 0.0 does not do"),
        (["demo", "--nothing", "3"], "nothing: there is no such field"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_a_command_that_cannot_be_is_refused_in_one_line(capsys, command, message):
    said = refusal(capsys, *command)
    assert said.startswith("tubelet: ")
    assert message in said


@pytest.mark.parametrize(
    "content", ["steps: [", "- 1", "encoder: 3", "data: {clip: 3}", "encoder:\n  widht: 3", "\x00"]
)
def test_a_recipe_file_that_is_no_recipe_is_refused_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert refusal(capsys, "pretrain", "--config", path, "--out", tmp_path / "run").startswith("tubelet: ")


def test_no_command_shows_the_usage_and_help_is_no_error(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.count("tubelet COMMAND --help") == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()
    for command in ("pretrain", "finetune", "pack", "merge", "index", "check", "inspect", "evaluate", "predict"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert "--" in said
        assert "default: null" not in said


def test_the_help_shows_what_may_stand_without_a_name(capsys):
    for command, arguments in (("pack", "[VIDEOS] SHARDS"), ("index", "TARS"), ("check", "SHARDS")):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = capsys.readouterr().out
        assert said.startswith(f"usage: tubelet {command} {arguments} [--FIELD VALUE ...]\n")
        assert "recipe" not in said, "these commands have none"
    assert "SHARDS, --shards SHARDS" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["--short-side", "32", "--jobs", "1", "SRC", "OUT"],
        ["SRC", "--short_side=32", "OUT", "--samples-per-shard=4", "--jobs=1"],
        ["--unlabelled", "SRC", "OUT", "--short-side", "32", "--jobs", "1"],
    ],
)
def test_options_take_dashes_and_stand_before_or_after_the_folders(tmp_path, arguments):
    make_video(tmp_path / "videos" / "run" / "one.mp4", frames=6)
    folders = {"SRC": str(tmp_path / "videos"), "OUT": str(tmp_path / "shards")}
    assert main(["pack", *(folders.get(argument, argument) for argument in arguments)]) == 0
    shards = ShardSet.open(tmp_path / "shards")
    assert (shards.samples, shards.short_side) == (1, 32)
    assert shards.labelled == ("--unlabelled" not in arguments)


def test_a_value_that_begins_with_a_dash_or_holds_dashes_is_left_alone(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = Path("--a-run-with-dashes")
    command = ["pretrain", "--config", recipe, f"--out={out}", "--steps", "4", "--log-every", "2"]
    assert main(command) == 0
    assert (out / "summary.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["--a-run-with-dashes"]
    resolved = (out / "config.yaml").read_text()
    assert "log_every: 2" in resolved
    assert main(["pretrain", f"--config={out / 'config.yaml'}"]) == 0
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--micro-batch", "0"], ["--micro-bath", "2"]])
def test_ranks_other_than_0_leave_it_to_rank_0_to_tell_what_is_wrong_with_an_evaluation(monkeypatch, capsys, option):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["evaluate", "--model", "/nowhere", "--shards", "/nowhere", *option]) == 2
        assert capsys.readouterr().err.count("\n") == lines


def test_ctrl_c_while_a_command_is_imported_is_one_line(capsys, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_pack", interrupt)
    assert main(["pack", "videos", "shards"]) == 130
    assert capsys.readouterr().err == "tubelet: interrupted before anything was done\n"
