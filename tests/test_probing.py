"""The probe of a pretraining run: what it logs, that training does not feel it, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.commandline import parse
from pretrain.config import PretrainConfig
from pretrain.data.pack import PackConfig, pack
from pretrain.data.shards import ShardSet
from pretrain.engine.checkpoint_search import find_checkpoint
from pretrain.engine.tracking import read_metrics
from pretrain.probing import open_probe_sets
from tests.runs import tiny_pretraining
from tests.videos import make_video

FIGURES = ("probe_errors", "probe_knn", "probe_rank", "probe_deviation", "collapsed")


@pytest.fixture(scope="module")
def recipe(packed_shards, tmp_path_factory) -> str:
    return str(tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards))


@pytest.fixture(scope="module")
def command(recipe, packed_shards) -> list[str]:
    """A run of four steps with a probe every two, without --out."""
    probe = ["--probe.shards", str(packed_shards), "--probe.every", "2", "--data.decode_limit_s", "0"]
    return ["pretrain", "--config", recipe, "--steps", "4", *probe]


@pytest.fixture(scope="module")
def probed(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("probed") / "run"
    assert main([*command, "--out", str(out)]) == 0
    return out


def probes(out: Path) -> list[dict]:
    return [entry for entry in read_metrics(out / "metrics.jsonl") if "probe_rank" in entry]


def test_the_first_probe_is_before_training_and_the_last_after_the_last_step(probed):
    found = probes(probed)
    assert [entry["step"] for entry in found] == [0, 2, 4]
    assert "loss" not in found[0]
    assert all("loss" in entry for entry in found[1:])
    for entry in found:
        assert 0 <= entry["probe_knn"] <= 1
        assert 1 <= entry["probe_rank"] <= 11
        assert (entry["probe_errors"], entry["collapsed"]) == (0, 0)
    summary = json.loads((probed / "summary.json").read_text())
    assert {name: summary[name] for name in FIGURES} == {name: found[-1][name] for name in FIGURES}
    page = (probed / "report.html").read_text()
    for said in ("<h2>Probe</h2>", "k-NN accuracy", "Effective rank of the features", "Deviation of the features"):
        assert said in page
    assert f"{found[-1]['probe_knn']:.1%}" in page


def test_training_does_not_feel_the_probe(recipe, probed, tmp_path):
    out = tmp_path / "run"
    assert main(["pretrain", "--config", recipe, "--steps", "4", "--out", str(out)]) == 0
    name = "encoder/model.safetensors"
    assert (out / name).read_bytes() == (probed / name).read_bytes()
    losses = [
        [entry["loss"] for entry in read_metrics(one / "metrics.jsonl") if "loss" in entry] for one in (out, probed)
    ]
    assert losses[0] == losses[1]
    assert "<h2>Probe</h2>" not in (out / "report.html").read_text()


def test_a_resumed_run_compares_with_its_own_beginning(command, probed, tmp_path):
    out = Path(shutil.copytree(probed, tmp_path / "run"))
    before = find_checkpoint(out / "checkpoints", "auto").state["probe"]
    first = probes(out)[0]
    assert before == {"before": [first["probe_rank"], first["probe_deviation"]], "collapsed": 0}
    assert main([*command, "--out", str(out), "--steps", "6"]) == 0
    assert find_checkpoint(out / "checkpoints", "auto").state["probe"] == before
    assert [entry["step"] for entry in probes(out)] == [0, 2, 4, 6]


def test_other_videos_may_ask_and_broken_ones_are_counted(command, packed_shards, tmp_path):
    asked = Path(shutil.copytree(packed_shards, tmp_path / "asked"))
    shards = ShardSet.open(asked)
    shard, place = shards.locate(3)
    with open(asked / shards.shards[shard].name, "r+b") as file:
        file.seek(shards.shard_index(shard).video_offsets[place] + 60)
        file.write(b"damage")
    assert main([*command, "--out", str(tmp_path / "run"), "--probe.asked", str(asked)]) == 0
    assert {entry["probe_errors"] for entry in probes(tmp_path / "run")} == {1}


def test_packed_clips_are_probed_one_by_one(command, sized_shards, tmp_path):
    packing = ["--data.packing.group", "2", "--data.packing.tokens", "64", "--encoder.positions", "separable"]
    options = ["--data.shards", str(sized_shards), "--probe.shards", str(sized_shards), "--data.clip.size", "16"]
    assert main([*command, *options, *packing, "--out", str(tmp_path / "run")]) == 0
    found = probes(tmp_path / "run")
    assert [entry["step"] for entry in found] == [0, 2, 4]
    assert found[0]["probe_rank"] > 2


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
        (["--probe.shards", "OTHER"], "probe.shards: OTHER has no labels; pack it from class folders"),
        (["--probe.shards", "ONE_CLASS"], "probe.shards: ONE_CLASS has videos of one class among the 2"),
        (["--probe.asked", "ONE_CLASS"], "probe.asked: the classes of ONE_CLASS are not those of probe.shards"),
        (["--probe.shards", "nowhere"], "probe.shards: nowhere"),
        (["--probe.shards", "null", "--probe.asked", "ONE_CLASS"], "probe.shards: is missing"),
        (["--probe.shards", "null", "--probe.stop_on_collapse", "true"], "probe.shards: is missing"),
        (["--probe.every", "0"], "probe.every: must be at least 1"),
        (["--probe.samples", "1"], "probe.samples: must be at least 2"),
    ],
)
def test_what_cannot_be_probed_is_refused_by_one_line(
    command, other_shards, one_class, tmp_path, capsys, options, message
):
    places = {"OTHER": str(other_shards), "ONE_CLASS": str(one_class)}
    given = [places.get(option, option) for option in options]
    for name, place in places.items():
        message = message.replace(name, place)
    assert main([*command, "--out", str(tmp_path / "run"), *given]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("tubelet: ") == 1
    assert not (tmp_path / "run").exists()


def test_a_class_of_one_video_is_told(command, monkeypatch):
    told = []
    monkeypatch.setattr("pretrain.probing.logger.warning", lambda text, *values: told.append(text % values))
    open_probe_sets(parse(PretrainConfig, "pretrain", [*command[1:], "--probe.samples", "3"]))
    (said,) = told
    assert said.startswith("probe.shards: jump: one video each among the 3 that are used")


def test_a_set_that_asks_itself_is_told(command, packed_shards, monkeypatch):
    told = []
    monkeypatch.setattr("pretrain.probing.logger.warning", lambda text, *values: told.append(text % values))
    open_probe_sets(parse(PretrainConfig, "pretrain", [*command[1:], "--probe.asked", str(packed_shards)]))
    (said,) = told
    assert said.startswith("probe.asked: is the set that probe.shards names, so each video is its own nearest")
