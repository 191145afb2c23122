"""Pretraining put together: where it starts from, what it measures on held-out samples, and its pictures."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launch.cli import main
from pretrain.commandline import parse
from pretrain.config import PretrainConfig
from pretrain.data.shards import ShardSet
from pretrain.data.views import EvaluationViews
from pretrain.engine.distributed import Processes
from pretrain.engine.tracking import Tracker
from pretrain.model.mae import MaskedAutoencoder
from pretrain.pictures import UNDECODED_NOTE
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


def test_pictures_of_plain_targets_say_so_show_all_that_is_masked_and_are_logged_at_the_last_step(
    recipe, tmp_path, monkeypatch
):
    logged = []
    monkeypatch.setattr(Tracker, "log_picture", lambda self, step, name, path: logged.append((step, name)))
    command = ["pretrain", "--config", recipe, "--out", str(tmp_path / "run"), "--steps", "4"]
    assert main([*command, "--decoder.targets", "pixels", "--mask.decoded", "0.5"]) == 0
    assert logged == [(4, f"reconstruction/{number}") for number in range(4)]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "brightness and contrast included" in page
    assert "interpolated from the visible" not in page
    assert UNDECODED_NOTE not in page
    strip = np.asarray(Image.open(tmp_path / "run/pictures/reconstruction-0.png"))[..., :3]
    last_row = strip[2 * (strip.shape[0] + 12) // 3 :]
    assert (last_row == 128).all(-1).mean() < 0.1, (
        "a quarter would be grey if the half that was not drawn were left out"
    )


def test_pictures_of_a_causal_mask_are_grey_where_training_never_decodes(recipe, tmp_path):
    command = ["pretrain", "--config", recipe, "--out", str(tmp_path / "run"), "--steps", "4"]
    command += ["--data.clip.frames", "12", "--encoder.name", "factorised_encoder"]
    causal = ["--mask.name", "causal", "--mask.ratio", "0.84", "--mask.decoded", "0.2"]  # slot 0 shows slot 1, of six
    assert main([*command, *causal]) == 0
    strip = np.asarray(Image.open(tmp_path / "run/pictures/reconstruction-0.png"))
    side = (strip.shape[1] + 4) // 12 - 4
    clip, seen, painted = (
        [strip[top : top + side, left : left + side] for left in range(0, strip.shape[1], side + 4)]
        for top in range(0, strip.shape[0], side + 12)
    )
    assert all(np.array_equal(one, other) for one, other in zip(clip[:2], painted[:2], strict=True))
    assert all(len(np.unique(frame)) > 2 for frame in painted[2:4])
    assert all(frame.reshape(-1, 4).tolist() == [[128, 128, 128, 255]] * side**2 for frame in painted[4:])
    assert all(len(np.unique(frame.reshape(-1, 4), axis=0)) == 1 for frame in seen[2:])
    assert UNDECODED_NOTE in (tmp_path / "run/report.html").read_text()
