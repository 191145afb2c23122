"""The probe of real processes: they share its work and find the same, under every ZeRO stage, and training goes on."""

from pathlib import Path

import pytest

from pretrain.engine.tracking import read_metrics
from tests.runs import run, tiny_pretraining


def probes(out: Path) -> list[dict]:
    return [entry for entry in read_metrics(out / "metrics.jsonl") if "probe_rank" in entry]


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(out / "metrics.jsonl") if "loss" in entry]


@pytest.fixture(scope="module")
def command(packed_shards, tmp_path_factory) -> list[object]:
    recipe = tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)
    return ["--config", recipe, "--steps", 4, "--encoder.drop_path", 0]


@pytest.fixture(scope="module")
def alone(command, packed_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    done = run("pretrain", [*command, "--probe.shards", packed_shards, "--probe.every", 2, "--out", folder], folder)
    assert done.code == 0, done.text
    return folder


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_two_processes_share_the_work_and_find_the_same(command, alone, packed_shards, tmp_path, stage):
    given = [*command, *([] if stage is None else ["--deepspeed", f"zero{stage}"])]
    probed, plain = tmp_path / "probed", tmp_path / "plain"
    probe = ["--probe.shards", packed_shards, "--probe.every", 2]
    done = run("pretrain", [*given, *probe, "--out", probed], tmp_path, world=2)
    assert done.codes == [0, 0], done.text
    first = probes(alone)[0]
    assert probes(probed)[0] == {name: pytest.approx(value, rel=1e-4) for name, value in first.items()}
    assert [entry["step"] for entry in probes(probed)] == [0, 2, 4]
    done = run("pretrain", [*given, "--out", plain], tmp_path, world=2)
    assert done.codes == [0, 0], done.text
    assert losses(plain) == losses(probed)
    name = "encoder/model.safetensors"
    assert (plain / name).read_bytes() == (probed / name).read_bytes()
