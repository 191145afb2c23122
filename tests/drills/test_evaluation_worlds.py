"""An evaluation of uneven videos, one of them broken, by several numbers of processes: the same files to the byte."""

import json
from pathlib import Path

import pytest
import torch

from finetune.classifier import ModelDescription, save_classifier
from finetune.config import HeadConfig
from pretrain.data.clips import ClipConfig
from pretrain.data.pack import PackConfig, pack
from pretrain.data.shards import ShardSet
from pretrain.model.encoder import EncoderConfig
from tests.runs import run
from tests.videos import make_video

VIDEOS = 37
BROKEN = 20
CLASSES = 7


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Shards of 37 videos of 1 to 23 frames, one of them damaged."""
    folder = tmp_path_factory.mktemp("uneven")
    for number in range(VIDEOS):
        name = f"class-{number % CLASSES}/{number}.mp4"
        make_video(folder / "videos" / name, frames=1 + number * 5 % 23, height=32, width=40 + 2 * number, seed=number)
    pack(PackConfig(source=str(folder / "videos"), out=str(folder / "shards"), samples_per_shard=8, jobs=1))
    opened = ShardSet.open(folder / "shards")
    shard, row = opened.locate(BROKEN)
    with open(opened.folder / opened.shards[shard].name, "r+b") as file:
        file.seek(opened.shard_index(shard).video_offsets[row] + 40)
        file.write(b"damage")
    return opened.folder


@pytest.fixture(scope="module")
def model(shards, tmp_path_factory) -> Path:
    """A classifier that was trained on nothing, of clips longer than many of the videos."""
    encoder = EncoderConfig(width=32, depth=2, heads=2, tubelet=(2, 8, 8)).resolved()
    opened = ShardSet.open(shards)
    description = ModelDescription(
        encoder,
        ClipConfig(frames=8, stride=1, size=16),
        HeadConfig(init_scale=20),
        opened.classes,
        opened.short_side,
        opened.frame_rate,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("untrained") / "model"
    save_classifier(folder, description.build(description.build_encoder()).state_dict(), description)
    return folder


def test_one_two_and_three_processes_write_the_same_files_to_the_byte(shards, model, tmp_path):
    found = []
    for world, workers in ((1, 0), (2, 1), (3, 0)):
        out = tmp_path / f"by-{world}"
        command = ["evaluate", "--model", model, "--shards", shards, "--out", out, "--workers", workers]
        started = run("launch", [*command, "--views.temporal", 2, "--views.spatial", 3], tmp_path, world=world)
        assert started.codes == [0] * world, started.text
        spoke = ["top-1 accuracy" in output.read_text() for output in started.outputs]
        assert spoke == [rank == 0 for rank in range(world)], "rank 0 speaks for all"
        found.append([(out / name).read_bytes() for name in ("evaluation.json", "predictions.jsonl", "report.html")])
    assert found[1] == found[0]
    assert found[2] == found[0]
    figures, predictions = json.loads(found[0][0]), [json.loads(line) for line in found[0][1].splitlines()]
    opened = ShardSet.open(shards)
    assert [one["key"] for one in predictions] == [opened.key(number) for number in range(VIDEOS)]
    assert [number for number, one in enumerate(predictions) if "error" in one] == [BROKEN]
    assert (figures["samples"], figures["errors"]) == (VIDEOS, 1)
    assert len({one["label_probability"] for one in predictions if "error" not in one}) == VIDEOS - 1
