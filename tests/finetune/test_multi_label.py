"""Sets whose videos have any number of labels: packed, trained on, evaluated, predicted, and told from others."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from finetune.config import MixingConfig
from finetune.objective import build_objective
from launch.cli import main
from pretrain.data.check import CheckConfig, check
from pretrain.data.clips import ClipConfig
from pretrain.data.loader import Batch
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.shards import ShardSet
from pretrain.data.sources import find_sources
from pretrain.errors import Refused
from pretrain.labelled import open_labelled
from tests.runs import TINY, TINY_ENCODER
from tests.videos import make_video

pytestmark = pytest.mark.xdist_group("official sets")  # one worker, which has imported what trains

LABELS = [("run",), ("run", "wave"), (), ("jump", "wave"), ("jump",), ("run", "jump", "wave"), ("wave",), ("run",)]
UNMIXED = ["--mixing.mixup", "0", "--mixing.cutmix", "0"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Eight videos of none to three classes."""
    folder = tmp_path_factory.mktemp("multi-label")
    for number in range(len(LABELS)):
        make_video(folder / "videos" / f"{number}.mp4", frames=8, height=32, width=32, seed=number)
    lines = [f"{number}.mp4 {';'.join(labels) or '-'}\n" for number, labels in enumerate(LABELS)]
    (folder / "list.txt").write_text("".join(lines))
    command = ["pack", str(folder / "videos"), str(folder / "shards"), "--list", str(folder / "list.txt")]
    assert main([*command, "--multi-label", "true", "--jobs", "1", "--samples-per-shard", "5"]) == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def command(shards, tmp_path_factory) -> list[str]:
    recipe = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    architecture = TINY_ENCODER.replace(", drop_path: 0.2", "")
    recipe.write_text(
        TINY.replace("data:", f"data:\n  shards: {shards}")
        + f"architecture: {architecture}\nsteps: 4\nmixing: {{mixup: 0.8, cutmix: 1.0}}\n"
    )
    return ["finetune", "--config", str(recipe), "--validation.shards", str(shards)]


@pytest.fixture(scope="module")
def finetuned(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finetuned") / "run"
    assert main([*command, "--out", str(out)]) == 0
    return out


def names_of(shards: ShardSet) -> dict[int, tuple[str, ...]]:
    """The names of the classes of each video, by its number."""
    found = {}
    for number, labels in enumerate(shards.label_lists()):
        source = shards.read(number).metadata["source"]
        found[int(Path(source).stem)] = tuple(sorted(shards.classes[label] for label in labels))
    return found


def test_shards_hold_every_label_and_webdataset_alone_reads_them(shards):
    opened = ShardSet.open(shards)
    assert (opened.classes, opened.multi_label) == (("jump", "run", "wave"), True)
    assert names_of(opened) == {number: tuple(sorted(labels)) for number, labels in enumerate(LABELS)}
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    read = {int(Path(one["json"]["source"]).stem): one["json"]["labels"] for one in samples}
    numbers = [sorted(opened.classes.index(name) for name in labels) for labels in LABELS]
    assert read == dict(enumerate(numbers))
    assert not any("cls" in one for one in samples)
    assert json.loads((shards / "index.json").read_text())["format_version"] == 2
    assert check(CheckConfig(str(shards), jobs=1)).problems == ()


def test_csv_files_and_numbers_give_the_same_labels(tmp_path):
    (tmp_path / "a.csv").write_text('path,labels,more\n"a, b.mp4",air drumming;run,\nc.mp4,run,wave\nd.mp4,,\n')
    sources = find_sources(None, tmp_path / "a.csv", multi_label=True)
    assert sources.classes == ("air drumming", "run", "wave")
    assert {video.path: video.label for video in sources.videos} == {"a, b.mp4": (0, 1), "c.mp4": (1, 2), "d.mp4": ()}
    (tmp_path / "a.txt").write_text("a b.mp4\tair drumming;2\nc.mp4 1;2;1\n")
    sources = find_sources(None, tmp_path / "a.txt", "air drumming,run,wave", multi_label=True)
    assert {video.path: video.label for video in sources.videos} == {"a b.mp4": (0, 2), "c.mp4": (1, 2)}
    (tmp_path / "b.csv").write_text("path,labels\n  \n\na.mp4,run\n,run\n")
    with pytest.raises(Refused, match=r"b\.csv:5: has no path in its first column"):
        find_sources(None, tmp_path / "b.csv", multi_label=True)
    (tmp_path / "b.txt").write_text("a.mp4 0;3\nb.mp4 1\n")
    assert find_sources(None, tmp_path / "b.txt", multi_label=True).classes == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("text", "classes", "words"),
    [
        ("a.mp4\n", None, r"a\.txt:1: no labels in 'a\.mp4'; write `path label;label`, or `path -` for none"),
        ("a.mp4 x;y\nb.mp4 z\n", "x,y", r"a\.txt:2: label 'z' is none of the 2 classes; correct it or --classes"),
        ("a.mp4 x\n./a.mp4 y\n", None, r"a\.txt:2: a\.mp4 stands on a line before already; write all of its labels on"),
        ("a.mp4 -\n", None, r"a\.txt: gives no video any label"),
        ("\n", None, r"a\.txt: empty; write one `path label;label` a line"),
    ],
)
def test_a_list_of_labels_that_cannot_be_is_refused(tmp_path, text, classes, words):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(Refused, match=words):
        find_sources(None, tmp_path / "a.txt", classes, multi_label=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "multi_label: needs a list of `path label;label` lines, or a CSV file"),
        (["--list", "a.txt", "--unlabelled", "true"], "multi_label, unlabelled: do not go together"),
        (["--annotations", "a.csv"], "multi_label, annotations: do not go together"),
    ],
)
def test_labels_come_from_lists_alone(shards, tmp_path, capsys, options, message):
    videos = str(shards.parent / "videos")
    assert main(["pack", videos, str(tmp_path / "out"), "--multi-label", "true", *options]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


def test_a_run_trains_with_mixed_labels_and_leaves_average_precisions(finetuned):
    figures = json.loads((finetuned / "evaluation.json").read_text())
    assert (figures["samples"], figures["errors"]) == (8, 0)
    assert 0 < figures["mean_average_precision"] <= 1
    entries = [json.loads(line) for line in (finetuned / "metrics.jsonl").read_text().splitlines()]
    assert entries[0]["loss"] == pytest.approx(0.693, abs=0.01), "even odds for every class at first"
    assert json.loads((finetuned / "summary.json").read_text())["micro_f1"] == figures["micro_f1"]
    assert "average precision" in (finetuned / "report.html").read_text()


def test_evaluation_finds_the_same_again_and_writes_a_score_for_each_class(finetuned, shards, tmp_path, capsys):
    command = ["evaluate", "--model", str(finetuned), "--shards", str(shards), "--workers", "0"]
    assert main([*command, "--out", str(tmp_path / "out"), "--threshold", "0.3"]) == 0
    assert "mean average precision" in capsys.readouterr().out
    assert (
        "Precision and recall are those of classes whose score reaches 0.3."
        in (tmp_path / "out" / "report.html").read_text()
    )
    figures, before = (json.loads((one / "evaluation.json").read_text()) for one in (tmp_path / "out", finetuned))
    assert figures["mean_average_precision"] == pytest.approx(before["mean_average_precision"])
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert sorted(tuple(sorted(one["labels"])) for one in lines) == sorted(tuple(sorted(labels)) for labels in LABELS)
    for one in lines:
        assert list(one["scores"]) == ["jump", "run", "wave"]
        assert one["predicted"] == [name for name, score in one["scores"].items() if score >= 0.3]
    assert main(["compare", str(finetuned), str(tmp_path / "out"), "--out", str(tmp_path / "comparison")]) == 0
    (settings,) = [line for line in capsys.readouterr().out.splitlines() if "threshold" in line]
    assert [part.strip() for part in settings.strip("│").split("│")] == ["threshold", "0.5", "0.3"]


def test_predict_gives_each_class_a_probability_of_its_own(finetuned, shards, capsys):
    capsys.readouterr()
    assert main(["predict", str(shards.parent / "videos" / "0.mp4"), "--model", str(finetuned)]) == 0
    shares = [float(line.split("%")[0]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(shares) == 3
    assert sum(shares) > 110, "near a half each, after four steps, and not a third"


def test_a_part_of_a_multi_label_set_is_held_out_by_class(command, tmp_path):
    share = ["--validation.shards", "null", "--validation.share", "0.3"]
    assert main([*command, "--out", str(tmp_path / "run"), *share, *UNMIXED]) == 0
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert 1 <= figures["samples"] <= 4


def test_sets_of_one_label_and_of_several_are_not_taken_for_each_other(
    command, finetuned, shards, packed_shards, tmp_path, capsys
):
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        (
            ["evaluate", "--model", str(finetuned), "--shards", str(packed_shards), *out],
            f"{packed_shards}: its samples have one label, and the model was trained for any number of labels; give a",
        ),
        (
            [*command, "--data.shards", str(packed_shards), *out],
            f"{shards}: its samples have any number of labels, and the model was trained for one label; give a set",
        ),
        ([*command, "--data.class_power", "0", *out], "data.class_power: 0.0 balances sets of one label a sample"),
        (
            [*command, *out, "--head.pool", "mean", *UNMIXED, "--data.packing", '{"group": 2, "tokens": 64}'],
            "data.packing: packed clips have one label each",
        ),
        (
            ["evaluate", "--model", str(finetuned), "--shards", str(shards), "--threshold", "1"],
            "threshold: 1.0 must lie between 0 and 1",
        ),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert message in said


def test_a_probe_of_several_labels_is_refused(shards):
    words = "train: the videos of .* have any number of labels; give a set of one label each"
    with pytest.raises(Refused, match=words):
        open_labelled("train", str(shards), ClipConfig(), CacheConfig())


@pytest.mark.parametrize("mixing", [MixingConfig(label_smoothing=0.2), MixingConfig(mixup=0.8, label_smoothing=0.2)])
def test_the_loss_is_the_binary_entropy_of_smoothed_and_mixed_labels(mixing):
    clips = torch.randint(0, 256, (2, 2, 4, 4, 3), dtype=torch.uint8)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.3, -2.0, 1.0]], dtype=torch.bfloat16)
    objective = build_objective(mixing, ClipConfig(), classes=3, multi_label=True)
    np.random.seed(0)
    loss = objective(lambda clips: logits, Batch(clips, labels, *[None] * 5))
    share = np.random.RandomState(0)
    targets = labels * 0.8 + 0.1
    if mixing.mixes:
        assert share.rand() < 1, "whether the batch is mixed"
        part = share.beta(0.8, 0.8)
        targets = part * targets + (1 - part) * targets.flip(0)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
