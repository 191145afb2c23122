"""Checkpoints that somebody damaged: passed over by name for an older one, and never a fresh start in their place."""

import logging
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.cli import main
from pretrain.engine.checkpoint_search import find_checkpoint, step_folders
from pretrain.engine.tracking import read_metrics
from pretrain.errors import Refused
from tests.runs import tiny_pretraining

pytestmark = pytest.mark.xdist_group("checkpoint damage")  # one worker, which makes once what these tests share


@pytest.fixture(scope="module")
def command(packed_shards, tmp_path_factory) -> list[str]:
    recipe = tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)
    return ["pretrain", "--config", str(recipe), "--steps", "8", "--checkpoint.every", "4"]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory) -> Path:
    """A run with checkpoints of steps 4 and 8."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main([*command, "--out", str(out)]) == 0
    return out


@pytest.fixture
def damaged(finished, tmp_path) -> Path:
    """A copy of the run, killed before its final figures."""
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    (out / "summary.json").unlink()
    return out


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


NAMES = ("model.safetensors", "optimizer.pt", "manifest.json")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), place=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_a_single_flipped_bit_anywhere_is_found_and_the_file_is_named(finished, caplog, name, place, bit):
    checkpoints = finished / "checkpoints"
    path = step_folders(checkpoints)[-1] / name
    whole = path.read_bytes()
    caplog.clear()
    flip(path, place, bit)
    try:
        with caplog.at_level(logging.WARNING, "pretrain"):
            saved = find_checkpoint(checkpoints, "auto")
    finally:
        path.write_bytes(whole)
    assert saved.step == 4
    assert f"passed over {path}" in caplog.text


@pytest.mark.parametrize("damage", [cut_short, Path.unlink])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_short_or_missing_is_found_and_named(damaged, caplog, damage, name):
    newest = step_folders(damaged / "checkpoints")[-1]
    damage(newest / name)
    with caplog.at_level(logging.WARNING, "pretrain"):
        assert find_checkpoint(damaged / "checkpoints", "auto").step == 4
    assert f"passed over {newest}" in caplog.text
    assert name in caplog.text


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one_to_the_same_end(finished, damaged, command, capsys):
    older, newest = step_folders(damaged / "checkpoints")
    flip(newest / "optimizer.pt", 1000)
    leftover = damaged / "checkpoints" / "step-00000012.tmp-1"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert main([*command, "--out", str(damaged)]) == 0
    said = capsys.readouterr().err
    assert f"WARNING: passed over {newest / 'optimizer.pt'}: its content differs" in said
    assert f"going on from step 4 ({older})" in said
    assert not leftover.exists()
    assert (damaged / "encoder" / "model.safetensors").read_bytes() == (
        finished / "encoder" / "model.safetensors"
    ).read_bytes()
    losses = [[entry["loss"] for entry in read_metrics(out / "metrics.jsonl")] for out in (finished, damaged)]
    assert losses[0] == losses[1]
    assert find_checkpoint(damaged / "checkpoints", "auto").step == 8


def test_pruning_never_counts_a_damaged_newer_checkpoint_against_whole_ones(damaged, command):
    newest = step_folders(damaged / "checkpoints")[-1]
    cut_short(newest / "model.safetensors")
    more = ["--steps", "6", "--checkpoint.keep_last", "1", "--out", str(damaged)]
    assert main([*command, *more]) == 0
    assert find_checkpoint(damaged / "checkpoints", "auto").step == 6


def test_when_all_are_damaged_the_run_is_refused_and_nothing_of_it_is_lost(damaged, command, capsys):
    for folder in step_folders(damaged / "checkpoints"):
        (folder / "manifest.json").unlink()
    before = (damaged / "metrics.jsonl").read_bytes()
    assert main([*command, "--out", str(damaged)]) == 2
    said = capsys.readouterr().err
    assert "tubelet: " in said
    assert "none of its 2 checkpoints can be read; restore one, or start afresh with another --out" in said
    assert "Traceback" not in said
    assert (damaged / "metrics.jsonl").read_bytes() == before
    assert [folder.name for folder in step_folders(damaged / "checkpoints")] == ["step-00000004", "step-00000008"]


def test_a_named_checkpoint_must_be_whole_and_another_model_is_refused(damaged, command, capsys):
    newest = step_folders(damaged / "checkpoints")[-1]
    assert main([*command, "--out", str(damaged), "--steps", "9", "--encoder.width", "64"]) == 2
    assert f"encoder.width: is 64, but {newest} was written with 32" in capsys.readouterr().err
    flip(newest / "model.safetensors", -1)
    with pytest.raises(Refused, match=r"model\.safetensors: its content differs"):
        find_checkpoint(damaged / "checkpoints", str(newest))
    with pytest.raises(Refused, match=r"nowhere: has no manifest\.json"):
        find_checkpoint(damaged / "checkpoints", str(damaged / "nowhere"))
