"""The features of videos: one row a video in order, whoever computes them; what cannot be decoded is told."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.commandline import parse
from pretrain.config import PretrainConfig
from pretrain.data.shards import ShardSet
from pretrain.data.views import EvaluationViews
from pretrain.engine.distributed import Processes
from pretrain.errors import Refused, StoppedByRule
from pretrain.features import features, mean_features_by, shared_features
from pretrain.neighbours import knn_accuracy
from pretrain.weights import encoder_from
from tests.runs import tiny_pretraining


@pytest.fixture(scope="module")
def config(packed_shards, tmp_path_factory) -> PretrainConfig:
    recipe = tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)
    return parse(PretrainConfig, "pretrain", ["--config", str(recipe)])


def test_the_features_of_a_set_are_one_row_a_video_in_order(config, packed_shards):
    torch.manual_seed(0)
    clip = config.data.clip
    encoder = encoder_from(config.encoder, clip)
    shards = ShardSet.open(packed_shards)
    found, labels = features(encoder, shards, clip, micro_batch=4)
    assert found.shape == (11, 32)
    assert labels.tolist() == shards.labels()
    assert torch.allclose(features(encoder, shards, clip, micro_batch=3)[0], found, atol=1e-6)
    assert knn_accuracy(found, labels, found, labels, neighbours=1) == 1.0
    shards.resampled = True
    with pytest.raises(Refused, match=r"^data\.clip\.stride: shards .* was packed with --fps"):
        features(encoder, shards, clip)
    shards.resampled = False
    encoder.norm.weight.data.fill_(float("nan"))
    with pytest.raises(StoppedByRule, match="features are not finite"):
        features(encoder, shards, clip)


def test_a_broken_video_has_its_reason_in_place_of_features(config, packed_shards, tmp_path):
    folder = Path(shutil.copytree(packed_shards, tmp_path / "shards"))
    shards = ShardSet.open(folder)
    shard, place = shards.locate(3)
    with open(folder / shards.shards[shard].name, "r+b") as file:
        file.seek(shards.shard_index(shard).video_offsets[place] + 60)
        file.write(b"damage")
    clip = config.data.clip
    encoder = encoder_from(config.encoder, clip).eval()
    with Processes() as processes:
        encode = mean_features_by(encoder, processes.device)
        found = shared_features(encode, EvaluationViews(shards, clip, 2, 1), np.arange(5), processes, 2, 0)
    assert found.values.shape == (5, 2, 32)
    assert [error is None for error in found.errors] == [True, True, True, False, True]
    kept = found.decoded()
    assert kept.keys == [shards.key(number) for number in (0, 1, 2, 4)]
    values, labels = kept.by_view()
    assert torch.equal(values[2], found.values[1, 0])
    assert labels.tolist() == [label for number in (0, 1, 2, 4) for label in [shards.labels()[number]] * 2]
    with pytest.raises(Refused, match=f"{shards.key(3)} cannot be decoded"):
        features(encoder, shards, clip)
