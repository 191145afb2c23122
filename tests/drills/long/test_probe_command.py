"""`tubelet probe` by several real processes, which share the computing of features, and after a kill."""

import json
from pathlib import Path

import pytest

from tests.runs import run, start, tiny_pretraining


@pytest.fixture(scope="module")
def encoder(packed_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    recipe = tiny_pretraining(folder, packed_shards)
    done = run("pretrain", ["--config", recipe, "--steps", 4, "--out", folder / "run"], folder)
    assert done.code == 0, done.text
    return folder / "run"


def arguments(encoder: Path, shards: Path, folder: Path) -> list[object]:
    kept = ["--out", folder / "probe", "--features", folder / "features"]
    return ["probe", "--encoder", encoder, "--train", shards, "--test", shards, "--workers", 0, *kept]


def found_in(folder: Path) -> dict:
    return json.loads((folder / "probe" / "summary.json").read_text())


def test_two_processes_find_what_one_finds_and_say_it_once(encoder, packed_shards, tmp_path):
    for world in (1, 2):
        command = arguments(encoder, packed_shards, tmp_path / str(world))
        done = run("launch", command, tmp_path / str(world), world=world)
        assert done.codes == [0] * world, done.text
        assert done.text.count("│ knn") == 1
    assert found_in(tmp_path / "1") == found_in(tmp_path / "2")
    assert "│ knn" not in done.outputs[1].read_text()


def test_a_probe_that_was_killed_goes_on_and_finds_the_same(encoder, packed_shards, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert run("launch", arguments(encoder, packed_shards, undisturbed), tmp_path).code == 0
    for pattern in ("mean-*/part-*", "tokens-*/key.json"):
        started = start("launch", arguments(encoder, packed_shards, killed), tmp_path)
        assert started.wait_for(lambda pattern=pattern: list((killed / "features").glob(pattern)))
        started.kill()
    done = run("launch", arguments(encoder, packed_shards, killed), tmp_path)
    assert done.code == 0, done.text
    assert found_in(killed) == found_in(undisturbed)
    parts = [
        sorted(path.name for path in (one / "features").glob("*/part-*.safetensors")) for one in (killed, undisturbed)
    ]
    assert parts[0] == parts[1]
