"""`tubelet probe`: what it finds in features that are known, what it writes, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from finetune import linear_probe
from finetune.attentive_probe import attentive_logits
from finetune.features import open_encoder
from finetune.linear_probe import PENALTIES, divide, linear_logits, part_of
from finetune.probe import EncoderProbeConfig, open_sets_of_probe
from launch.cli import main
from pretrain.data.pack import PackConfig, pack
from pretrain.data.shards import ShardSet
from pretrain.data.subset import Subset, write_keys
from pretrain.features import VideoFeatures
from tests.videos import make_video, pack_labelled_videos

QUICK = ["--workers", "0", "--decode_limit_s", "0"]


def videos(values: torch.Tensor, labels: torch.Tensor) -> VideoFeatures:
    return VideoFeatures(values, labels, [str(number) for number in range(len(labels))], [None] * len(labels))


def clusters(count: int, views: int, seed: int) -> VideoFeatures:
    """Mean features of three classes, each around a corner of its own."""
    labels = torch.arange(count) % 3
    noise = torch.randn(count, views, 8, generator=torch.Generator().manual_seed(seed))
    return videos(torch.eye(8)[labels].unsqueeze(1) * 4 + noise, labels)


def test_the_linear_probe_tells_classes_apart_and_leaves_a_class_without_videos_improbable():
    logits, chosen = linear_logits(clusters(60, 2, 0), clusters(30, 2, 1), classes=4, seed=0)
    assert logits.shape == (30, 2, 4)
    assert (logits.mean(1).argmax(1) == torch.arange(30) % 3).float().mean() > 0.9
    assert logits.exp()[..., 3].max() < 1e-20
    assert torch.allclose(logits.exp().sum(-1), torch.ones(30, 2), atol=1e-5)
    assert chosen["penalty"] in PENALTIES


def test_a_binary_problem_has_two_logits():
    train = videos(torch.tensor([[[float(number % 2)]] for number in range(8)]), torch.arange(8) % 2)
    logits, _ = linear_logits(train, train, classes=2, seed=0)
    assert logits.argmax(-1).flatten().tolist() == [0, 1] * 4


def test_test_videos_have_no_part_in_the_choice(monkeypatch):
    asked = []
    ask = linear_probe._ask
    monkeypatch.setattr(linear_probe, "_ask", lambda train, test, *rest: asked.append(test) or ask(train, test, *rest))
    train, test = clusters(30, 1, 0), clusters(9, 1, 1)
    linear_logits(train, test, classes=3, seed=0)
    assert [one is test for one in asked] == [False] * len(PENALTIES) + [True]


def test_a_fifth_of_each_class_is_held_out_and_nothing_of_a_class_of_one():
    labels = torch.tensor([0] * 10 + [1] * 2 + [2])
    kept, held_out = divide(videos(torch.zeros(13, 1, 1), labels), seed=0)
    assert sorted(kept + held_out) == list(range(13))
    assert labels[held_out].tolist() == [0, 0, 1]
    assert divide(videos(torch.zeros(13, 1, 1), labels), seed=0) == (kept, held_out)
    assert divide(videos(torch.zeros(13, 1, 1), labels), seed=1) != (kept, held_out)


def test_the_attentive_probe_finds_the_one_token_that_tells_the_class(monkeypatch):
    monkeypatch.setattr("finetune.attentive_probe.LEAST_STEPS", 100)
    monkeypatch.setattr("finetune.attentive_probe.RATES", (1e-3, 3e-3))
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 2
    tokens = 0.1 * torch.randn(96, 1, 6, 16, generator=generator)
    marked = torch.randint(6, (96,), generator=generator)
    tokens[torch.arange(96), 0, marked, 0] = 4.0
    tokens[torch.arange(96), 0, marked, 1] = labels.float() * 8 - 4
    everything = videos(tokens.half(), labels)
    train, test = (part_of(everything, list(numbers)) for numbers in (range(64), range(64, 96)))
    logits, chosen = attentive_logits(train, test, classes=2, heads=2, seed=0, device=torch.device("cpu"))
    assert logits.shape == (32, 1, 2)
    assert (logits[:, 0].argmax(1) == test.labels).float().mean() > 0.9
    assert chosen["learning_rate"] in (1e-3, 3e-3)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """Shards of six videos, one of which cannot be decoded."""
    folder = pack_labelled_videos(tmp_path_factory.mktemp("damaged"), 6)
    shards = ShardSet.open(folder)
    shard, place = shards.locate(3)
    with open(folder / shards.shards[shard].name, "r+b") as file:
        file.seek(shards.shard_index(shard).video_offsets[place] + 60)
        file.write(b"damage")
    return folder


def test_each_probe_writes_what_an_evaluation_writes(pretrained, packed_shards, damaged, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("finetune.attentive_probe.LEAST_STEPS", 4)
    out = tmp_path / "probe"
    command = ["probe", "--encoder", str(pretrained), "--train", str(packed_shards), "--test", str(damaged), *QUICK]
    command += ["--out", str(out), "--features", str(tmp_path / "features")]
    assert main(command) == 0
    said = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == ["knn", "linear", "attentive"]
    assert all(kind in said for kind in summary)
    assert "top-5" not in said, "which tells nothing of two classes"
    for kind, figures in summary.items():
        found = json.loads((out / kind / "evaluation.json").read_text())
        assert found["top1"] == figures["top1"]
        assert (found["samples"], found["errors"], found["probe"], found["untrained"]) == (6, 1, kind, False)
        assert found["fingerprint"] == ShardSet.open(damaged).fingerprint
        lines = [json.loads(line) for line in (out / kind / "predictions.jsonl").read_text().splitlines()]
        assert len({line["key"] for line in lines}) == 6
        right = sum(line["label"] == line.get("predicted") for line in lines)
        assert right / 6 == pytest.approx(found["top1"], abs=1e-4)
        assert (out / kind / "report.html").exists()
        assert yaml.safe_load((out / kind / "config.yaml").read_text())["kind"] == kind
    fresh = [*command, "--untrained", "--kind", "knn", "--out", str(tmp_path / "untrained")]
    assert main(fresh) == 0
    other = json.loads((tmp_path / "untrained/knn/evaluation.json").read_text())
    assert other["untrained"]
    assert other["encoder_sha256"] != found["encoder_sha256"]
    assert "with fresh weights" in " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def one_class(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one-class")
    for number in range(2):
        make_video(folder / f"videos/run/{number}.mp4", seed=number)
    pack(PackConfig(source=str(folder / "videos"), out=str(folder / "shards"), jobs=1))
    return folder / "shards"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "OTHER"], "train: OTHER has no labels; pack it from class folders or with --list"),
        (["--test", "OTHER"], "test: OTHER has no labels; pack it from class folders or with --list"),
        (["--test", "ONE_CLASS"], "test: the classes of ONE_CLASS are not those of train"),
        (
            ["--train", "ONE_CLASS", "--test", "ONE_CLASS"],
            "train: ONE_CLASS has videos of one class; give a set of two",
        ),
        (["--train", "nowhere"], "train: nowhere"),
        (["--encoder", "nowhere"], "nowhere: holds no encoder; give a pretraining run"),
        (["--kind", "liner"], "kind: "),
        (["--tokens_limit_gib", "1e-9"], "tokens_limit_gib: the attentive probe's tokens take"),
        (["--views.temporal", "0"], "views.temporal, views.spatial: must be at least 1"),
    ],
)
def test_what_cannot_be_probed_is_refused_by_one_line(
    pretrained, packed_shards, other_shards, one_class, tmp_path, capsys, options, message
):
    places = {"OTHER": str(other_shards), "ONE_CLASS": str(one_class)}
    given = [places.get(option, option) for option in options]
    for name, place in places.items():
        message = message.replace(name, place)
    command = ["probe", "--encoder", str(pretrained), "--train", str(packed_shards), "--test", str(packed_shards)]
    assert main([*command, "--out", str(tmp_path / "out"), *QUICK, *given]) == 2
    said = capsys.readouterr().err
    assert f"tubelet: {message}" in said
    assert said.count("tubelet: ") == 1
    assert not (tmp_path / "out").exists()


def test_videos_of_one_set_that_are_learned_from_and_tested_on_are_told(pretrained, packed_shards, tmp_path, caplog):
    write_keys(tmp_path / "keys.txt", Subset(ShardSet.open(packed_shards), range(8), "first"))
    shards = str(packed_shards)
    config = EncoderProbeConfig(str(pretrained), shards, shards, train_split=str(tmp_path / "keys.txt"))
    open_sets_of_probe(config, open_encoder(config.encoder, untrained=False, seed=0))
    assert "test: 8 of its 11 videos are in train too" in caplog.text
