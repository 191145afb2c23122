"""The sets of a run: splits, shares and folds of one set, the same for both stages and any world; bad ones refused."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from finetune.config import FinetuneConfig
from launch.cli import main
from pretrain.commandline import parse
from pretrain.config import PretrainConfig
from pretrain.data.shards import ShardSet
from pretrain.data.subset import Subset, write_keys
from pretrain.errors import Refused
from pretrain.sets import open_run_sets
from pretrain.stage import order_of
from tests.runs import TINY, TINY_ENCODER, tiny_pretraining

pytestmark = pytest.mark.xdist_group("official sets")  # one worker, which has imported what trains


@pytest.fixture
def finetuning(packed_shards, tmp_path) -> list[str]:
    recipe = tmp_path / "finetuning.yaml"
    architecture = TINY_ENCODER.replace(", drop_path: 0.2", "")
    recipe.write_text(
        TINY.replace("data:", f"data:\n  shards: {packed_shards}") + f"architecture: {architecture}\nsteps: 4\n"
    )
    return ["finetune", "--config", str(recipe), "--out", str(tmp_path / "finetuned")]


def opened(command: list[str], *options: str) -> tuple[FinetuneConfig, ShardSet, ShardSet]:
    config = parse(FinetuneConfig, "finetune", [*command[1:], *options])
    config.validate()
    sets = open_run_sets(config)
    assert sets.held_out is not None
    return config, sets.training[0], sets.held_out


def keys_in(path: Path) -> list[str]:
    return path.read_text().split()


def test_both_stages_hold_out_the_same_fold_and_never_read_it(finetuning, packed_shards, tmp_path, capsys):
    fold = ["--validation.folds", "3", "--validation.fold", "2", "--log_keys", "true"]
    recipe = tiny_pretraining(tmp_path, packed_shards)
    assert (
        main(["pretrain", "--config", str(recipe), "--out", str(tmp_path / "pretrained"), "--steps", "4", *fold]) == 0
    )
    capsys.readouterr()
    assert main([*finetuning, *fold]) == 0
    assert re.search(
        r"fold 2 of 3 of \S+: 7 samples are trained on and 4 held out; \S+/finetuned/split lists their keys",
        capsys.readouterr().err,
    )
    held_out = keys_in(tmp_path / "finetuned" / "split" / "validation.txt")
    for run in ("pretrained", "finetuned"):
        lists = [keys_in(tmp_path / run / "split" / f"{name}.txt") for name in ("training", "validation")]
        assert lists[1] == held_out
        assert sorted(lists[0] + lists[1]) == sorted(ShardSet.open(packed_shards).keys())
        read = [json.loads(line)["keys"] for line in (tmp_path / run / "keys.jsonl").read_text().splitlines()]
        assert {key for keys in read for key in keys} <= set(lists[0])
        capsys.readouterr()
        assert main(["order", "--config", str(tmp_path / run / "config.yaml"), "--steps", "1:4"]) == 0
        listed = [json.loads(line)["key"] for line in capsys.readouterr().out.splitlines()]
        assert sorted(listed) == sorted(key for keys in read for key in keys)


def test_the_keys_that_a_run_wrote_are_evaluated_again_to_the_same_figures(finetuning, packed_shards, tmp_path):
    assert main([*finetuning, "--validation.share", "0.3"]) == 0
    run = tmp_path / "finetuned"
    keys = str(run / "split" / "validation.txt")
    command = ["evaluate", "--model", str(run), "--shards", str(packed_shards), "--split", keys, "--workers", "0"]
    assert main(command) == 0
    ours, theirs = (json.loads((folder / "evaluation.json").read_text()) for folder in (run, run / "evaluation"))
    assert (ours["split"], theirs["split"]) == ("share 0.3", keys)
    same = ("top1", "mean_class_accuracy", "samples", "fingerprint")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


def test_a_run_goes_on_with_the_samples_that_it_began_with_only(finetuning, tmp_path, capsys):
    share = ["--validation.share", "0.3"]
    assert main([*finetuning, *share]) == 0
    assert main([*finetuning, *share]) == 0, "the same again, which is finished"
    capsys.readouterr()
    assert main([*finetuning, *share, "--validation.seed", "1", "--steps", "8"]) == 2
    told = (
        r"tubelet: data\.shards: is \S+, all but share 0\.3 \(fingerprint \w+\), but .* was written with \S+, all but"
    )
    assert re.search(told, capsys.readouterr().err)


def test_folds_hold_out_each_sample_once_and_balance_what_is_left(finetuning):
    keys, classes = Counter(), []
    for fold in range(1, 4):
        options = ["--validation.folds", "3", "--validation.fold", str(fold), "--data.class_power", "0"]
        config, training, held_out = opened(finetuning, *options)
        keys.update(held_out.keys())
        classes.append(Counter(held_out.labels()))
        order = order_of(config, training)
        labels = training.labels()
        for step in range(3):
            assert Counter(labels[number] for number in order.step(step).samples) == {0: 2, 1: 2}
    assert set(keys.values()) == {1}
    assert len(keys) == 11
    assert all(count in (1, 2) for held in classes for count in held.values())


def test_a_part_of_a_split_can_be_held_out(finetuning, packed_shards, tmp_path):
    whole = ShardSet.open(packed_shards)
    write_keys(tmp_path / "keys.txt", Subset(whole, range(8), "first"))
    _, training, held_out = opened(finetuning, "--data.split", str(tmp_path / "keys.txt"), "--validation.share", "0.25")
    assert sorted(training.keys() + held_out.keys()) == sorted(whole.keys()[:8])
    assert held_out.samples == 2


def test_an_unlabelled_set_is_divided_too(other_shards, tmp_path):
    recipe = tiny_pretraining(tmp_path, other_shards)
    config = parse(PretrainConfig, "pretrain", ["--config", str(recipe), "--steps", "1", "--validation.share", "0.2"])
    sets = open_run_sets(config)
    assert sets.held_out is not None
    assert (sets.training[0].samples, sets.held_out.samples) == (4, 1)


def test_a_class_with_one_clip_is_refused_where_a_part_is_held_out_and_warned_of_in_training(
    finetuning, packed_shards, tmp_path, capsys
):
    whole = ShardSet.open(packed_shards)
    labels = whole.labels()
    lone = [number for number, label in enumerate(labels) if label == 1] + [labels.index(0)]
    write_keys(tmp_path / "keys.txt", Subset(whole, lone, "lone"))
    split = ["--data.split", str(tmp_path / "keys.txt")]
    told = []
    for options in ("--validation.share=0.2", *(f"--validation.folds=2 --validation.fold={fold}" for fold in (1, 2))):
        try:
            _, training, _ = opened(finetuning, *split, *options.split())
            assert set(training.labels()) == {0, 1}
        except Refused as error:
            told.append(str(error))
    share, fold = told  # one of the two folds does not hold the lone clip out
    words = f"class 'jump' of {packed_shards} has 1 sample, too few to train on some and hold others out; add videos of"
    assert share.startswith(f"validation.share: {words}")
    assert fold.startswith(f"validation.folds: {words}")
    assert main([*finetuning, *split]) == 0
    said = capsys.readouterr().err
    assert "class 'jump' has one sample to train on, which cannot tell what its videos share; add more of it" in said


def test_groups_too_large_to_part_are_refused_with_their_number(finetuning, packed_shards):
    with pytest.raises(Refused, match=r"class 'jump' of .* has 5 samples in 1 group, too few"):
        opened(finetuning, "--validation.share", "0.2", "--validation.group", "^(jump|run)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--validation.share", "1"], "validation.share: 1.0 must lie between 0 and 1"),
        (["--validation.folds", "1", "--validation.fold", "1"], "validation.folds: 1 must be at least 2"),
        (["--validation.folds", "5"], "validation.fold, validation.folds: fold None of 5 cannot be; give both"),
        (["--validation.folds", "5", "--validation.fold", "6"], "fold 6 of 5 cannot be; give both, and a fold from 1"),
        (["--validation.folds", "5", "--validation.fold", "0"], "fold 0 of 5 cannot be; give both, and a fold from 1"),
        (
            ["--validation.share", "0.1", "--validation.shards", "x"],
            "validation.shards, validation.share: each tells what is held out; give one of them",
        ),
        (["--validation.seed", "3"], "validation.seed: belongs to validation.share or validation.folds"),
        (["--validation.group", "x"], "validation.group: belongs to validation.share or validation.folds"),
        (["--validation.split", "test1"], "validation.split: test1 is a split of data.shards, all of which would be"),
        (["--data.split", "nowhere"], "data.split: nowhere is no split of "),
        (["--validation.share", "0.2", "--validation.group", "("], "validation.group: '(' is no regular expression"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_held_out_is_refused_in_one_line(finetuning, tmp_path, capsys, options, message):
    assert main([*finetuning, *options]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("tubelet: ")
    assert message in said
    assert not (tmp_path / "finetuned").exists()


def test_samples_that_are_trained_on_are_not_held_out(finetuning, packed_shards, tmp_path):
    whole = ShardSet.open(packed_shards)
    copy = shutil.copytree(packed_shards, tmp_path / "copy")
    write_keys(tmp_path / "one.txt", Subset(whole, range(6), "one"))
    write_keys(tmp_path / "two.txt", Subset(whole, range(4, 9), "two"))
    one, two = ["--data.split", str(tmp_path / "one.txt")], ["--validation.split", str(tmp_path / "two.txt")]
    words = "validation.split: 2 of the 5 samples of .*two.txt are trained on too .*one.txt"
    with pytest.raises(Refused, match=words):
        opened(finetuning, *one, *two)
    with pytest.raises(Refused, match=words):
        opened(finetuning, *one, *two, "--validation.shards", str(copy))
    with pytest.raises(Refused, match=r"5 of the 5 samples of .*two.txt are trained on too \(all of "):
        opened(finetuning, *two, "--validation.shards", str(packed_shards))
    with pytest.raises(Refused, match=r"validation.shards: 6 of the 11 samples of .*copy are trained on too"):
        opened(finetuning, *one, "--validation.shards", str(copy))


def test_a_set_that_is_trained_on_and_held_out_as_a_whole_is_told(finetuning, packed_shards, tmp_path, capsys):
    length = ["--steps", "1", "--optimizer.warmup_steps", "0"]
    held_out = ["--validation.shards", str(packed_shards)]
    assert main([*finetuning, *held_out, *length, "--out", str(tmp_path / "run")]) == 0
    assert "validation.shards: is a set that is trained on" in capsys.readouterr().err


def test_a_mixture_has_no_part_to_hold_out(packed_shards, other_shards, tmp_path, capsys):
    mixture = json.dumps({str(packed_shards): 1, str(other_shards): 1})
    recipe = tiny_pretraining(tmp_path, other_shards)
    command = ["pretrain", "--config", str(recipe), "--steps", "4", "--data.mixture", mixture]
    for option, message in (
        (["--validation.share", "0.2"], "validation.share: holds out a part of data.shards, and data.mixture names"),
        (["--data.split", "train1"], "data.split: train1 is a split of data.shards, and data.mixture names several"),
    ):
        assert main([*command, *option]) == 2
        assert message in capsys.readouterr().err
