"""A classifier of clips that spread over the whole video keeps seeing such clips: in evaluation and in prediction."""

import json

import torch

from finetune.classifier import load
from finetune.config import ViewsConfig
from finetune.predict import clips_of
from launch.cli import main
from pretrain.data.clips import cut, view_box
from pretrain.data.transcode import transcode
from pretrain.data.video import open_video
from tests.videos import make_video

SEGMENTS = ["--data.clip.sampling", "segments"]


def test_a_classifier_of_segments_is_evaluated_and_asked_on_segments(finetuning, packed_shards, tmp_path):
    out, views = tmp_path / "run", ["--views.temporal", "2"]
    short = ["--data.clip.stride", "null", "--steps", "4", "--validation.every", "4", "--checkpoint.every", "4"]
    assert main([*finetuning, *SEGMENTS, *views, *short, "--out", str(out)]) == 0
    _, description = load(out)
    assert (description.clip.sampling, description.clip.stride, description.clip.frame_rate) == ("segments", None, None)
    command = ["evaluate", "--model", str(out), "--shards", str(packed_shards), "--workers", "0"]
    assert main([*command, *views]) == 0
    evaluated = json.loads((out / "evaluation" / "evaluation.json").read_text())
    trained = json.loads((out / "evaluation.json").read_text())
    assert [evaluated[name] for name in ("top1", "samples")] == [trained[name] for name in ("top1", "samples")]

    video = make_video(tmp_path / "long.mp4", frames=40)
    stored = transcode(str(video), short_side=description.short_side, gop=16, frame_rate=description.frame_rate)
    shown = clips_of(stored, description, ViewsConfig(temporal=2))
    whole = torch.from_numpy(open_video(stored.video).read([0, 10, 20, 30, 5, 15, 25, 35]))
    expected = cut(whole, view_box(stored.height, stored.width, 0, 1), description.clip.size)
    assert torch.equal(shown.flatten(0, 1), expected)


def test_segments_with_a_stride_are_refused_by_name(finetuning, tmp_path, capsys):
    capsys.readouterr()
    assert main([*finetuning, "--out", str(tmp_path / "run"), *SEGMENTS]) == 2
    assert "data.clip.sampling: segments spread over the whole video" in capsys.readouterr().err
