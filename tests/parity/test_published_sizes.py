"""Parameters and multiply-adds of every named size, counted on torch's meta device, against the published figures."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.model.encoder import VARIANTS, EncoderConfig
from pretrain.model.encoders import build_encoder

CLASSES = 1000

# Parameters of the image ViT with a class token and 1000 classes at 224 pixels: torchvision's documentation (B, L with
# patches of 16, H of 14), DeiT's (arXiv 2012.12877, table 1: 5.7 M and 22 M, in timm to the digit) and timm's g of 14.
PARAMETERS = {
    "Ti": (16, 5_717_416),
    "S": (16, 22_050_664),
    "B": (16, 86_567_656),
    "L": (16, 304_326_632),
    "H": (14, 632_045_800),
    "g": (14, 1_012_611_432),
}

# Multiply-adds ("GFLOPs") of VideoMAE for one clip of 16 frames of 224 pixels (arXiv 2203.12602 and the authors' model
# zoo). They count linear layers and both products of attention, without a class token and without the head.
MULTIPLY_ADDS = {"S": 57e9, "B": 180e9, "L": 597e9, "H": 1192e9}


def test_every_named_size_is_compared():
    assert PARAMETERS.keys() == VARIANTS.keys()


@pytest.mark.parametrize("variant", PARAMETERS)
def test_a_named_size_has_the_published_number_of_parameters(variant):
    patch, published = PARAMETERS[variant]
    config = EncoderConfig(variant=variant, tubelet=(1, patch, patch), positions="learned", biases="all")
    with torch.device("meta"):
        model = nn.Sequential(build_encoder(config, 1, 224, class_token=True), nn.Linear(config.sizes().width, CLASSES))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count + config.sizes().width == published, "the class token's position is folded into the class token"


@pytest.mark.parametrize("variant", MULTIPLY_ADDS)
def test_a_named_size_takes_videomaes_multiply_adds(variant):
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(variant=variant), frames=16, size=224)
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, 16, 224, 224, 3))
    assert counter.get_total_flops() / 2 == pytest.approx(MULTIPLY_ADDS[variant], rel=0.01)
