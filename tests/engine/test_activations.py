"""What is counted on fake tensors against what a real forward pass keeps, and operations against a formula."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pretrain.engine.activations import fake_activations, kept_activations, step_flops
from pretrain.model.blocks import recompute_activations
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import build_encoder
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder


class Clips(NamedTuple):
    clips: Tensor
    visible: Tensor
    masked: Tensor


BATCH = Clips(
    torch.randint(256, (2, 8, 32, 32, 3), dtype=torch.uint8),
    torch.arange(16).repeat(2, 1),
    torch.arange(16, 64).repeat(2, 1),
)


def build(name: str = "joint") -> MaskedAutoencoder:
    config = EncoderConfig(name=name, width=48, depth=3, heads=3, temporal_depth=2, tubelet=(2, 8, 8))
    return MaskedAutoencoder(build_encoder(config, 8, 32), DecoderConfig(32, 2, 2))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return model(*batch).loss.mean()


@pytest.mark.parametrize(("precision", "casts"), [("fp32", False), ("bf16", False), ("bf16", True)])
@pytest.mark.parametrize("recomputes", [False, True])
def test_fake_tensors_keep_what_real_ones_do(precision, casts, recomputes):
    with torch.device("meta"):
        faked = build()
    real = build()
    if recomputes:
        recompute_activations(faked)
        recompute_activations(real)
    if casts:
        real.bfloat16()
    expected = kept_activations(real, BATCH, loss_of, autocasts=precision == "bf16" and not casts)
    counted = fake_activations(faked, BATCH, loss_of, precision, casts)
    assert counted.total == pytest.approx(expected.total, rel=0.01)
    assert counted.largest == pytest.approx(expected.largest, rel=0.01)
    assert next(faked.parameters()).is_meta, "the model is left as it is"
    assert next(faked.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["factorised_encoder", "factorised_self_attention", "cross_frame"])
def test_every_encoder_goes_through_fake_tensors(name):
    with torch.device("meta"):
        faked = build(name)
    expected = kept_activations(build(name), BATCH, loss_of)
    assert fake_activations(faked, BATCH, loss_of, "fp32", False).total == pytest.approx(expected.total, rel=0.01)


def test_twice_the_clips_keep_twice_as_much_and_recomputing_keeps_the_inputs_of_blocks():
    with torch.device("meta"):
        model = build()
    once = fake_activations(model, BATCH, loss_of, "fp32", False)
    twice = fake_activations(model, Clips(*(torch.cat([part, part]) for part in BATCH)), loss_of, "fp32", False)
    assert twice.total == pytest.approx(2 * once.total, rel=0.01)
    recompute_activations(model)
    recomputed = fake_activations(model, BATCH, loss_of, "fp32", False)
    inputs = 4 * 2 * (3 * 16 * 48 + 2 * 64 * 32)
    assert inputs <= recomputed.total <= once.total - 2 * once.largest


def test_weights_do_not_count_and_operations_are_those_of_the_matrix_products():
    with torch.device("meta"):
        model = nn.Linear(30, 20)
    batch = Clips(torch.ones(7, 30), torch.ones(0), torch.ones(0))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch.clips).sum()

    assert fake_activations(model, batch, loss, "fp32", False).total == 4 * 7 * 30
    assert step_flops(model, batch, loss) == 2 * (2 * 7 * 30 * 20), "forward, and the gradient of the weights"
    assert model.weight.grad is None
