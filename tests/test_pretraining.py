"""Pretraining put together: where it starts from, what it measures on held-out samples, and its pictures."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from launch.cli import main
from pretrain.commandline import parse
from pretrain.config import PretrainConfig
from pretrain.data.shards import ShardSet
from pretrain.data.views import EvaluationViews
from pretrain.engine.distributed import Processes
from pretrain.engine.tracking import Tracker
from pretrain.model.mae import MaskedAutoencoder
from pretrain.pretraining import fixed_masks, reconstruction_loss_on
from pretrain.weights import encoder_from
from tests.runs import tiny_pretraining


@pytest.fixture(scope="module")
def recipe(packed_shards, tmp_path_factory) -> str:
    return str(tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards))


@pytest.fixture(scope="module")
def pretrained(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    assert main(["pretrain", "--config", recipe, "--out", str(out), "--steps", "4"]) == 0
    return out


def test_a_run_asks_for_decord_only_by_name(recipe, packed_shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    command = ["pretrain", "--config", recipe, "--steps", "4", "--validation.shards", str(packed_shards)]
    command += ["--data.decode_limit_s", "0"]  # in this process, where decord cannot be imported now
    assert main([*command, "--out", str(tmp_path / "auto")]) == 0
    assert list((tmp_path / "auto" / "pictures").iterdir())
    with pytest.raises(ImportError, match="decord"):
        main([*command, "--out", str(tmp_path / "decord"), "--data.decoder", "decord"])


def damaged(shards: Path, folder: Path, numbers: range | list[int]) -> ShardSet:
    """Copies shards and damages the videos of some samples."""
    shutil.copytree(shards, folder)
    opened = ShardSet.open(folder)
    for number in numbers:
        shard, place = opened.locate(number)
        with open(folder / opened.shards[shard].name, "r+b") as file:
            file.seek(opened.shard_index(shard).video_offsets[place] + 60)
            file.write(b"damage")
    return opened


def test_held_out_samples_that_cannot_be_decoded_are_counted_and_do_not_touch_the_loss(recipe, packed_shards, tmp_path):
    config = parse(PretrainConfig, "pretrain", ["--config", recipe])
    bad = [1, 4]
    some = damaged(packed_shards, tmp_path / "some", bad)
    none = damaged(packed_shards, tmp_path / "none", range(11))
    torch.manual_seed(0)
    model = MaskedAutoencoder(encoder_from(config.encoder, config.data.clip), config.decoder).eval()
    views = EvaluationViews(some, config.data.clip)
    with Processes() as processes, torch.no_grad():
        losses = [
            model(views[number, True].clips, *fixed_masks(config.mask, config, [number], processes.device)).loss
            for number in range(some.samples)
            if number not in bad
        ]
        figures = reconstruction_loss_on(some, config, processes, model)
        assert figures.pop("validation_errors") == 2
        assert figures == {"validation_loss": pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)}
        assert reconstruction_loss_on(none, config, processes, model) == {"validation_errors": 11}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--encoder.heads", "4", "encoder.heads: is 4, but the encoder in"),
        ("--encoder.positions", "sincos_3d", "encoder.positions: is sincos_3d, but the encoder in"),
        ("--encoder.tubelet", "[2,16,4]", "encoder.tubelet: is (2, 16, 4), but the encoder in"),
        ("--data.clip.std", "[0.5,0.5,0.5]", "data.clip.std: is (0.5, 0.5, 0.5), but the encoder in"),
    ],
)
def test_weights_that_fit_by_shape_but_were_trained_as_another_encoder_are_no_start(
    recipe, pretrained, tmp_path, capsys, option, value, message
):
    out = tmp_path / "run"
    command = ["pretrain", "--config", recipe, "--out", str(out), "--steps", "4", "--init", str(pretrained)]
    assert main([*command, option, value]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_stride_is_refused_on_a_resampled_held_out_set_too(recipe, packed_shards, tmp_path, capsys):
    other = Path(shutil.copytree(packed_shards, tmp_path / "other"))
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps(index | {"resampled": True}))
    command = ["pretrain", "--config", recipe, "--out", str(tmp_path / "run"), "--steps", "4"]
    assert main([*command, "--validation.shards", str(other)]) == 2
    assert f"data.clip.stride: validation.shards {other} was packed with --fps" in capsys.readouterr().err


def test_pictures_of_plain_targets_say_so_and_are_logged_at_the_last_step(recipe, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(Tracker, "log_picture", lambda self, step, name, path: logged.append((step, name)))
    command = ["pretrain", "--config", recipe, "--out", str(tmp_path / "run"), "--steps", "4"]
    assert main([*command, "--decoder.targets", "pixels"]) == 0
    assert logged == [(4, f"reconstruction/{number}") for number in range(4)]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "brightness and contrast included" in page
    assert "interpolated from the visible" not in page
