"""Resuming with another configuration: what cannot change is refused by name, what can goes on soundly."""

import json

import pytest

from launch.cli import main
from pretrain.engine.checkpoint_search import step_folders
from pretrain.engine.manifest import verify
from pretrain.engine.tracking import read_metrics
from tests.runs import tiny_pretraining

SAMPLES = 11


@pytest.fixture
def command(packed_shards, tmp_path) -> list[str]:
    """A run that has done 3 steps of 4 samples: an epoch of 2 steps, and the first 4 positions of the next."""
    recipe = tiny_pretraining(tmp_path, packed_shards)
    command = ["pretrain", "--config", str(recipe), "--out", str(tmp_path / "run"), "--log_keys", "true"]
    command += ["--optimizer.warmup_steps", "1"]
    assert main([*command, "--steps", "3"]) == 0
    return command


def test_a_changed_global_batch_is_refused_unless_overridden_and_then_reads_the_rest_of_the_epoch(
    command, tmp_path, capsys
):
    out = tmp_path / "run"
    other = [*command, "--data.global_batch", "2", "--steps", "10", "--checkpoint.every", "4"]
    capsys.readouterr()
    assert main(other) == 2
    assert "data.global_batch: is 2, but" in capsys.readouterr().err
    assert main([*other, "--override_config", "true"]) == 0
    keys = [entry["keys"] for entry in read_metrics(out / "keys.jsonl")]
    assert [len(read) for read in keys] == [4] * 3 + [2] * 7
    second_epoch, third_epoch = (
        [key for read in steps for key in read] for steps in (keys[2:6], keys[6:])
    )  # its last position stands alone: no step reads it
    assert len(set(second_epoch)) == len(second_epoch) == SAMPLES - 1
    assert len(set(third_epoch)) == len(third_epoch)
    assert verify(step_folders(out / "checkpoints")[-1]).state["samples_read"] == 3 * 4 + 7 * 2
    newest = step_folders(out / "checkpoints")[-1]
    (newest / "manifest.json").unlink()  # as if the kill had come after step 8
    (out / "summary.json").unlink()
    assert main(other) == 0
    assert "going on from step 8" in capsys.readouterr().err
    assert [entry["keys"] for entry in read_metrics(out / "keys.jsonl")] == keys


def test_a_length_in_epochs_counts_what_the_smaller_batch_still_has_to_read(command, tmp_path):
    overridden = [*command, "--data.global_batch", "2", "--override_config", "true", "--epochs", "3"]
    assert main(overridden) == 0
    steps = 3 + (SAMPLES - 4) // 2 + SAMPLES // 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == steps


def test_another_mask_can_be_insisted_on_and_another_model_or_order_cannot(command, capsys):
    insisting = [*command, "--steps", "5", "--override_config", "true"]
    capsys.readouterr()
    assert main([*insisting, "--mask.ratio", "0.75", "--seed", "7", "--encoder.heads", "4"]) == 2
    said = capsys.readouterr().err
    for difference in ("seed: is 7", "encoder.heads: is 4", "mask.ratio: is 0.75"):
        assert difference in said
    assert "--override_config cannot change seed, encoder.heads" in said
    assert main([*insisting, "--mask.ratio", "0.75"]) == 0
    assert "mask.ratio: is 0.75" in capsys.readouterr().err
