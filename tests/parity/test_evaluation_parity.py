"""Multi-view testing of a converted classifier against transformers' model, run on the same views and averaged."""

import numpy as np
import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from finetune.classifier import load
from finetune.config import ViewsConfig
from finetune.evaluate import cutter_of, logits_on
from launch.cli import main
from pretrain.data.shards import ShardSet
from pretrain.engine.distributed import Processes
from tests.parity.references import CLASSES, PATCH, SIZES, perturbed

TOLERANCE = 1e-4


@torch.no_grad()
def test_the_logits_of_fifteen_views_are_the_mean_of_transformers_logits(packed_shards, tmp_path):
    config = VideoMAEConfig(**SIZES, patch_size=PATCH, num_labels=CLASSES, use_mean_pooling=True, layer_norm_eps=1e-6)
    theirs = perturbed(VideoMAEForVideoClassification(config))
    theirs.fc_norm.eps = 1e-6
    theirs.save_pretrained(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    ours, description = load(tmp_path / "ours")
    shards = ShardSet.open(packed_shards)
    cutter = cutter_of(shards, description, ViewsConfig(temporal=5, spatial=3))
    with Processes() as processes:
        found = logits_on(ours, cutter, np.arange(shards.samples), processes, micro_batch=2, workers=0)
    mean, std = torch.tensor(description.clip.mean), torch.tensor(description.clip.std)
    greatest = 0.0
    for number, one in enumerate(found):
        clips = cutter[number, True].clips
        assert clips.shape[0] == 15
        views = [((clip / 255 - mean) / std).permute(0, 3, 1, 2)[None] for clip in clips]
        expected = torch.stack([theirs(view).logits[0] for view in views]).mean(0).numpy()
        greatest = max(greatest, float(np.abs(one.logits - expected).max()))
        assert np.ptp(expected) > 0.1, "logits this alike would prove nothing"
    assert greatest == pytest.approx(0, abs=TOLERANCE)
