"""Layer-wise decay and mixing against timm: the same groups for its ViT, the same pictures for every frame."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay

from finetune.classifier import Classifier
from finetune.config import HeadConfig, MixingConfig
from finetune.objective import build_objective, mix
from pretrain.data.clips import ClipConfig
from pretrain.data.loader import Batch
from pretrain.engine.optimizer import OptimizerConfig, build_optimizer
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import build_encoder

DEPTH = 6
DECAY, WEIGHT_DECAY = 0.7, 0.05


def place_of(name: str) -> str:
    """Where a parameter of either model stands: in the embedding, in a block, or in the head and the norm below it."""
    block = re.search(r"blocks\.(\d+)\.", name)
    if block:
        return f"block {block[1]}"
    return "embedding" if re.search(r"patch_embed|pos_embed|embedding", name) else "head"


def scales(groups: list[dict], model: torch.nn.Module) -> dict[tuple[str, bool], set[tuple[float, float]]]:
    """From a place and whether a matrix is meant to the factors on the rate and the decays that occur there."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[tuple[str, bool], set[tuple[float, float]]] = {}
    for group in groups:
        for parameter in group["params"]:
            is_matrix = parameter.squeeze().ndim > 1 and "pos_embed" not in names[parameter]
            key = place_of(names[parameter]), is_matrix
            found.setdefault(key, set()).add((group["lr_scale"], group["weight_decay"]))
    return found


def test_the_groups_of_layer_decay_are_timms_for_its_vit_of_the_same_depth():
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    theirs = VisionTransformer(depth=DEPTH, global_pool="avg", class_token=False, **sizes)
    config = EncoderConfig(width=32, depth=DEPTH, heads=2, tubelet=(2, 16, 16))
    ours = Classifier(build_encoder(config, 4, 32), HeadConfig(pool="mean"), 5)
    expected = param_groups_layer_decay(
        theirs, WEIGHT_DECAY, no_weight_decay_list=theirs.no_weight_decay(), layer_decay=DECAY
    )
    found = build_optimizer(ours, OptimizerConfig(layer_decay=DECAY, weight_decay=WEIGHT_DECAY), 256).param_groups
    assert scales(found, ours) == scales(expected, theirs)
    assert len(scales(found, ours)) == 2 * (DEPTH + 2)


@pytest.fixture
def batch() -> Batch:
    clips = torch.randint(0, 256, (4, 3, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(clips, torch.tensor([0, 3, 1, 4]), *[None] * 5)


@pytest.mark.parametrize(
    "mixing",
    [{"mixup_alpha": 0.8}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}],
)
def test_each_frame_is_mixed_as_timm_mixes_a_batch_of_such_pictures(batch, mixing):
    mixup, clip = Mixup(**mixing, label_smoothing=0.1, num_classes=5), ClipConfig()
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (clip.mean, clip.std))
    kinds = set()
    for seed in range(12):
        np.random.seed(seed)
        mixed, targets = mix(mixup, batch, clip)
        for number in range(batch.clips.shape[1]):
            pictures = (batch.clips[:, number].permute(0, 3, 1, 2).float() / 255 - mean) / std
            unmixed = pictures.clone()
            np.random.seed(seed)
            expected, expected_targets = mixup(pictures, batch.labels)
            assert torch.allclose(mixed[:, number].permute(0, 3, 1, 2), expected, atol=1e-6)
            assert torch.equal(targets, expected_targets)
            is_cut = ((expected == unmixed) | (expected == unmixed.flip(0))).all()
            kinds.add("cutmix" if is_cut else "mixup")
    assert kinds == {name for name in ("mixup", "cutmix") if mixing.get(f"{name}_alpha", 0) > 0}


def test_the_recipe_reaches_timm_whole(batch, monkeypatch):
    given: dict = {}
    monkeypatch.setattr("finetune.objective.Mixup", lambda **options: given.update(options))
    mixing = MixingConfig(mixup=0.3, cutmix=0.6, probability=0.7, switch_probability=0.4, label_smoothing=0.2)
    build_objective(mixing, ClipConfig(), classes=5)
    ours = list(dataclasses.asdict(mixing).values())
    names = ("mixup_alpha", "cutmix_alpha", "prob", "switch_prob", "label_smoothing")
    assert given == dict(zip(names, ours, strict=True), num_classes=5, multi_label=False)
