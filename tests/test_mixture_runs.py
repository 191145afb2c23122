"""Pretraining on a mixture: it resumes to the bit, goes on with the same sets only, and can be listed."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from pretrain.data.shards import ShardSet
from tests.runs import tiny_pretraining

pytestmark = pytest.mark.xdist_group("mixture runs")  # one worker, which makes once what these tests share


@pytest.fixture(scope="module")
def recipe(packed_shards, other_shards, tmp_path_factory) -> str:
    """A recipe of 6 samples a step in 3 lanes, two of the larger set."""
    path = tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)
    content = yaml.safe_load(path.read_text())
    del content["data"]["shards"]
    content["data"] |= {"mixture": {str(packed_shards): 2, str(other_shards): 1}, "global_batch": 6, "lanes": 3}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mixture") / "run"
    assert main(["pretrain", "--config", recipe, "--out", str(out), "--steps", "6", "--checkpoint.every", "3"]) == 0
    return out


def test_a_run_on_a_mixture_resumes_to_the_bit(run, tmp_path):
    command = ["pretrain", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "resumed")]
    assert main([*command, "--resume", str(run / "checkpoints" / "step-00000003")]) == 0
    weights = [folder / "encoder" / "model.safetensors" for folder in (run, tmp_path / "resumed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_s_mixture_is_listed(run, packed_shards, other_shards, capsys):
    capsys.readouterr()
    assert main(["order", "--config", str(run / "config.yaml"), "--steps", "1:6", "--world", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["set"] for line in lines] == [0, 0, 0, 0, 1, 1] * 6
    assert [line["rank"] for line in lines] == [0, 0, 1, 1, 2, 2] * 6
    for number, folder in enumerate((packed_shards, other_shards)):
        shards = ShardSet.open(folder)
        keys = {shards.key(sample) for sample in range(shards.samples)}
        assert {line["key"] for line in lines if line["set"] == number} <= keys


def mixture_told(lanes: dict[Path, int]) -> str:
    return ", ".join(
        f"{folder} in {share} lanes (fingerprint {ShardSet.open(folder).fingerprint})"
        for folder, share in lanes.items()
    )


@pytest.mark.parametrize("change", ["weights", "sets", "to one set"])
def test_a_run_goes_on_with_the_same_mixture_only(run, packed_shards, other_shards, capsys, change):
    sets = {
        "weights": {packed_shards: 1, other_shards: 2},
        "sets": {other_shards: 2, packed_shards: 1},
    }
    before = mixture_told({packed_shards: 2, other_shards: 1})
    alone = f"{packed_shards} (fingerprint {ShardSet.open(packed_shards).fingerprint})"
    differing = [("data.shards", alone, "none"), ("data.mixture", "none", before)]
    if change in sets:
        differing = [("data.mixture", mixture_told(sets[change]), before)]
    options = ["--data.shards", str(packed_shards)]
    if change in sets:
        options = ["--data.mixture", json.dumps({str(folder): weight for folder, weight in sets[change].items()})]
    capsys.readouterr()
    assert main(["pretrain", "--config", str(run / "config.yaml"), "--steps", "9", *options]) == 2
    said = capsys.readouterr().err
    newest = run / "checkpoints" / "step-00000006"
    told = "; ".join(f"{field}: is {here}, but {newest} was written with {there}" for field, here, there in differing)
    again = "that" if change in sets else "those"
    assert said == f"tubelet: {told}; use {again} again or give another --out\n"


def test_a_run_goes_on_where_the_sets_of_its_mixture_were_moved_to(run, packed_shards, other_shards, tmp_path, capsys):
    out = shutil.copytree(run, tmp_path / "run")
    moved = {
        str(shutil.copytree(folder, tmp_path / str(weight))): weight
        for folder, weight in ((packed_shards, 2), (other_shards, 1))
    }
    capsys.readouterr()
    more = ["--out", str(out), "--steps", "8", "--data.mixture", json.dumps(moved)]
    assert main(["pretrain", "--config", str(run / "config.yaml"), *more]) == 0
    assert "going on from step 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.lanes", "2"], "data.mixture: the weights 2, 1 do not give each set whole lanes of data.lanes 2; use"),
        (["--data.lanes", "1"], "data.lanes: 1 lanes are too few for the 2 sets of data.mixture; use more"),
        (["--data.lanes", "4"], "data.lanes: 4 lanes do not divide data.global_batch 6; use 3"),
        (
            ["--data.global_batch", "18"],
            "holds 11 samples, fewer than the 12 that a step takes of it; lower its weight",
        ),
        (["--data.mixture", "{}"], "data.mixture: holds no set"),
        (["--data.mixture", '{"/nowhere": 1}'], "data.mixture: /nowhere: no such folder"),
        (
            ["--data.mixture", '{"/nowhere": -1}'],
            "data.mixture: the weight -1.0 of /nowhere must be finite and greater",
        ),
        (["--data.mixture", '{"/nowhere": "much"}'], "data.mixture: "),
        (["--data.mixture", '{"/nowhere": 1}', "--data.shards", "/nowhere"], "data.shards, data.mixture: give one of"),
        (["--data.mixture", "null"], "data.shards: is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mixture_that_cannot_be_is_refused_in_one_line(recipe, tmp_path, capsys, options, message):
    capsys.readouterr()
    assert main(["pretrain", "--config", recipe, "--out", str(tmp_path / "run"), "--steps", "8", *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("tubelet: data.")
    assert message in said


def test_finetuning_refuses_a_mixture(capsys):
    options = ["--steps", "3", "--data.clip.stride", "1", "--data.mixture", '{"a": 1}']
    assert main(["finetune", "--encoder", "runs/none", *options]) == 2
    assert "data.mixture: is for pretraining; finetuning reads one labelled set" in capsys.readouterr().err
