"""Explanations: heat lies on what the head reads, in the right frames and places of a video that players can show."""

import dataclasses
import errno
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

import finetune
import finetune.explain
from finetune.classifier import Classifier, ModelDescription
from finetune.config import HeadConfig, ViewsConfig
from finetune.explain import explanation_paths, name_of_view, rate_of
from finetune.explanation_video import HEADING_PX, MARGIN_PX, Caption, draw_explanation
from finetune.heat_map import HeatMap, heat_map
from finetune.predict import PredictionOptions, Predictor
from finetune.predict import clips_of as cut_views
from launch.cli import main
from pretrain.data.clips import ClipConfig
from pretrain.data.sequence_plan import PackingConfig
from pretrain.data.transcode import transcode
from pretrain.errors import DiskFull, Refused
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import ENCODERS
from tests.tokens import attracting
from tests.videos import make_video, read_video, truncate

TINY = EncoderConfig(width=48, depth=2, heads=2, temporal_depth=2, tubelet=(2, 8, 8), positions="sincos_3d")
CLIP = ClipConfig(frames=4, stride=1, size=32)
POOLS = ("class_token", "mean", "attention")


def described(name: str = "joint", pool: str = "class_token", **fields) -> ModelDescription:
    encoder = dataclasses.replace(TINY, name=name)
    return ModelDescription(encoder, CLIP, HeadConfig(pool=pool), ("jump", "run"), 32, None, **fields)  # type: ignore[arg-type]


def classifier_of(description: ModelDescription) -> Classifier:
    torch.manual_seed(0)
    model = description.build(description.build_encoder())
    with torch.no_grad():
        for parameter in model.parameters():  # far from even attention
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def clips_of(count: int) -> Tensor:
    shape = (count, 4, 32, 32, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def looking_for_white(description: ModelDescription) -> Predictor:
    model = classifier_of(description)
    attracting(model.encoder)
    with torch.no_grad():  # black counts against a tubelet, so that noise of the codec does not decide
        model.encoder.embedding.projection.bias[0] -= 5
    return Predictor(model, description, "white")


def white_block(folder: Path, height: int, width: int, frames: int = 4) -> str:
    """Makes a black video with a white block of 8 x 8 in the last two frames, at row 2 and column 1 of blocks."""
    pictures = np.zeros((frames, height, width, 3), np.uint8)
    pictures[-2:, 16:24, 8:16] = 255
    return str(make_video(folder / "block.mp4", pictures=pictures, options={"qp": "0"}))


def panels_of(video: Path, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the brightness of the two panels of an explanation, in blocks of 8 x 8 of the clip's pixels."""
    frames = read_video(video)
    wide = (frames.shape[2] - 3 * MARGIN_PX) // 2
    block = wide * 8 // width
    panels = []
    for left in (MARGIN_PX, 2 * MARGIN_PX + wide):
        panel = frames[:, HEADING_PX : HEADING_PX + block * height // 8, left : left + wide].mean(-1)
        panels.append(panel.reshape(len(panel), height // 8, block, width // 8, block).mean((2, 4)))
    return panels[0], panels[1]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", list(ENCODERS))
def test_every_encoder_with_every_pool_has_a_heat_map(name, pool):
    model, clips = classifier_of(described(name, pool)), clips_of(2)
    found = heat_map(model, clips[1:])
    assert found.heat.shape == (2, 4, 4)
    assert np.array_equal(found.clip, clips[1].numpy())
    assert found.heat.min() > 0
    if pool == "class_token" or name == "cross_frame":  # of class tokens something stays in what they become
        assert found.heat.sum() < 0.99
    else:
        assert found.heat.sum() == pytest.approx(1, abs=1e-5)
    assert not np.allclose(found.heat, heat_map(model, clips[:1]).heat, atol=1e-4)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_where_all_tubelets_are_alike_mean_pooling_looks_everywhere_alike(name):
    description = described(name, "mean")
    encoder = dataclasses.replace(description.encoder, positions="learned")  # of which nothing is left
    model = looking_for_white(dataclasses.replace(description, encoder=encoder)).model
    heat = heat_map(model, torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8)).heat
    assert np.allclose(heat, heat.mean(), atol=1e-3 * heat.mean())


@torch.no_grad()
@pytest.mark.parametrize("name", ["joint", "factorised_encoder"])
def test_what_attention_pooling_returns_is_rebuilt_from_the_weights_of_its_query(name):
    model = classifier_of(described(name, "attention"))
    encoded = model.encoder(clips_of(2))
    pool = model.pool.attention
    values = pool.kv(encoded.last()).chunk(2, -1)[1].unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
    weights = torch.stack(list(model.pool.compared(encoded).weights()), 1)
    found = pool.proj((weights @ values).transpose(1, 2).flatten(2))
    found = (found + pool.mlp(pool.norm(found)))[:, 0]
    torch.testing.assert_close(found, model.pool(encoded), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.pool.weights(encoded), weights.mean(1)[:, 0])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)], ids=["", "packed"])
def test_the_one_tubelet_that_a_model_looks_at_is_hot_in_its_frames_and_its_place(tmp_path, height, width):
    is_packed = height != width
    description = described(pool="mean", packing=PackingConfig(tokens=64)) if is_packed else described()
    model = looking_for_white(dataclasses.replace(description, short_side=height))
    options = PredictionOptions(ViewsConfig(temporal=2), explain=str(tmp_path / "shown"))
    (found,) = model.predict(white_block(tmp_path, height, width), options)
    assert found.explanation == str(tmp_path / "shown" / "block.mp4")
    plain, hot = panels_of(Path(found.explanation), height, width)
    expected = np.zeros((4, height // 8, width // 8), bool)
    expected[2:, 2, 1] = True
    assert np.array_equal(plain > 128, expected)
    assert hot[expected].min() > 150
    assert hot[~expected].max() < 40


@torch.no_grad()
def test_the_view_is_shown_in_which_the_class_has_its_largest_logit(tmp_path):
    model = looking_for_white(described(pool="mean"))
    last = model.model.head[-1]
    last.bias.copy_(torch.tensor([0.0, 100.0]))  # all views are a run, some more than others
    video = white_block(tmp_path, 32, 32, frames=8)
    views = cut_views(transcode(video, short_side=32), model.description, ViewsConfig(temporal=2))
    shown = set()
    for sign in (1, -1):
        last.weight.mul_(sign)
        options = PredictionOptions(ViewsConfig(temporal=2), explain=str(tmp_path / str(sign)))
        (found,) = model.predict(video, options)
        plain, _ = panels_of(Path(found.explanation), 32, 32)
        loudest = int(model.model(views)[:, 1].argmax())
        assert (plain.max() > 128) == (views[loudest].max() > 128)
        shown.add(loudest)
    assert shown == {0, 1}


def test_frames_are_as_fast_as_the_model_sees_them():
    assert rate_of(ClipConfig(frame_rate=7.5), 30) == 7.5
    assert rate_of(ClipConfig(stride=4), 30) == 7.5
    assert rate_of(ClipConfig(sampling="segments"), 30) == 4


def test_the_view_is_named_by_its_time_window_and_its_crop():
    clip = ClipConfig()
    assert name_of_view(0, ViewsConfig(1, 1), clip) == ""
    assert name_of_view(1, ViewsConfig(3, 1), clip) == "time window 2 of 3"
    assert name_of_view(2, ViewsConfig(1, 3), clip) == "crop 3 of 3"
    assert name_of_view(7, ViewsConfig(5, 3), clip) == "time window 3 of 5, crop 2 of 3"
    assert name_of_view(1, ViewsConfig(2, 1), dataclasses.replace(clip, sampling="segments")) == "shift 2 of 2"


@pytest.mark.parametrize(("height", "width"), [(16, 16), (30, 50), (333, 401)])
def test_the_caption_stands_above_and_the_size_is_even(height, width):
    found = HeatMap(np.full((2, height, width, 3), 99, np.uint8), np.ones((1, 2, 2)) / 4)
    captions = [Caption(name * 60, 0.5, "file\n\udcff" * 12, "time window 1 of 3") for name in "ab"]
    first, second = (np.asarray(next(draw_explanation(found, caption))) for caption in captions)
    assert first.shape[0] % 2 == first.shape[1] % 2 == 0
    differ = np.argwhere((first != second).any((1, 2)))
    assert 0 < differ.min() < differ.max() < HEADING_PX
    assert (first[:, -MARGIN_PX:] == first[0, 0]).all()


def test_the_command_explains_good_videos_and_names_the_broken_one(finetuned, tmp_path, capsys):
    good = [str(make_video(tmp_path / name / "one.mp4", seed=seed)) for seed, name in enumerate(("a", "b"))]
    broken = str(truncate(make_video(tmp_path / "broken.mp4"), 0.3))
    command = ["predict", good[0], broken, good[1], "--model", str(finetuned), "--json", "--jobs", "0"]
    assert main(command) == 1
    plain = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    shown = tmp_path / "new" / "shown"
    assert main([*command, "--explain", str(shown)]) == 1
    said = capsys.readouterr()
    explained = [json.loads(line) for line in said.out.splitlines()]
    assert said.err.count("\n") == 1
    assert said.err.startswith(f"tubelet: {broken}: cannot be decoded")
    written = [str(shown / "one.mp4"), None, str(shown / "one-2.mp4")]
    assert [one.pop("explanation") for one in explained] == written
    assert explained == plain
    assert sorted(path.name for path in shown.iterdir()) == ["one-2.mp4", "one.mp4"]
    with av.open(written[0]) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.frames) == ("h264", 12, 4)
    assert main([*command[:-3], "--explain", str(tmp_path / "text")]) == 1
    assert f"  explained by {tmp_path / 'text' / 'one.mp4'}" in capsys.readouterr().out.splitlines()


def test_predictions_are_the_same_to_the_bit_with_and_without(finetuned, tmp_path):
    videos = [str(make_video(tmp_path / f"{seed}.mp4", seed=seed)) for seed in range(3)]
    model = finetune.load(finetuned)
    options = PredictionOptions(micro_batch=2)
    plain = list(model.predict(videos, options))
    explained = list(model.predict(videos, dataclasses.replace(options, explain=str(tmp_path / "shown"))))
    assert [one.classes for one in explained] == [one.classes for one in plain]
    assert all(one.explanation is None for one in plain)
    assert list(model.predict(videos, options)) == plain


def test_no_two_files_have_one_explanation(tmp_path):
    files = ["a.mp4", "x/a.mp4", "a.avi", "a-2.mp4", "A.mp4", "b", "l" * 250 + "1.mp4", "l" * 250 + "2.mp4"]
    names = [path.name for path in explanation_paths(tmp_path / "shown", files)]
    assert names[:6] == ["a.mp4", "a-2.mp4", "a-3.mp4", "a-2-2.mp4", "A-4.mp4", "b.mp4"]
    assert len({name.casefold() for name in names}) == len(files)
    assert max(map(len, names)) < 240


def test_an_explanation_replaces_no_file(finetuned, tmp_path, capsys):
    video = make_video(tmp_path / "one.mp4")
    content = video.read_bytes()
    command = ["predict", str(tmp_path), "--model", str(finetuned), "--explain"]
    assert main([*command, str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err == f"tubelet: --explain: {video} is there already; name another folder, or remove it\n"
    assert said.out == ""
    assert video.read_bytes() == content
    assert main([*command, str(video)]) == 2
    assert capsys.readouterr().err.startswith(f"tubelet: {video}: cannot be written (File exists)")
    with pytest.raises(Refused, match="give another --explain"):
        explanation_paths(video / "below", ["one.mp4"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_explanation_that_is_cut_off_leaves_nothing(tmp_path, monkeypatch, error):
    def cut_off(path: Path, content: bytes) -> None:
        raise error

    monkeypatch.setattr(finetune.explain, "write_bytes", cut_off)
    predictor = looking_for_white(described())
    video = make_video(tmp_path / "one.mp4")
    with pytest.raises((KeyboardInterrupt, DiskFull)):
        list(predictor.predict([video], PredictionOptions(explain=str(tmp_path / "shown"))))
    assert list((tmp_path / "shown").iterdir()) == []
