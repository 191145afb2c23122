"""The schedule as a pure function of the step, and which parameters decay."""

import copy
import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.clips import ClipConfig
from pretrain.engine.optimizer import OptimizerConfig, build_optimizer
from pretrain.engine.schedule import build_schedule
from pretrain.errors import Refused
from pretrain.model.encoder import EncoderConfig
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder
from pretrain.weights import encoder_from


def model_of(name: str = "joint") -> MaskedAutoencoder:
    config = EncoderConfig(name=name, width=16, depth=2, heads=2, temporal_depth=1, tubelet=(2, 8, 8))
    encoder = encoder_from(config, ClipConfig(frames=4, stride=1, size=16))
    return MaskedAutoencoder(encoder, DecoderConfig(width=16, depth=1, heads=2))


def rates(config: OptimizerConfig, batch: int, warmup: int, total: int, steps: list[int]) -> dict[int, float]:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config, batch)
    schedule = build_schedule(optimizer, config, batch, warmup, total)
    found = {}
    for step in steps:
        schedule.step_update(step)
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        found[step] = optimizer.param_groups[0]["lr"]
    return found


@settings(max_examples=25, deadline=None)
@given(total=st.integers(2, 60), data=st.data(), seed=st.integers(0, 99))
def test_the_rate_of_a_step_does_not_depend_on_the_steps_before(total, data, seed):
    warmup = data.draw(st.integers(0, total - 1))
    config, steps = OptimizerConfig(), list(range(total))
    shuffled = random.Random(seed).sample(steps, total)
    assert rates(config, 64, warmup, total, steps) == rates(config, 64, warmup, total, shuffled)


def test_the_rate_warms_up_linearly_and_falls_along_a_cosine_to_the_least():
    config = OptimizerConfig(base_lr=1.0, base_min_lr=0.1, warmup_lr=0.0)
    found = rates(config, 512, 10, 110, list(range(111)))
    assert [found[step] for step in range(11)] == pytest.approx([2.0 * step / 10 for step in range(11)])
    for step in range(10, 111):
        expected = 0.2 + (2.0 - 0.2) * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert found[step] == pytest.approx(expected, rel=1e-9)
    assert all(later < earlier for earlier, later in itertools.pairwise([found[step] for step in range(10, 111)]))


@pytest.mark.parametrize("batch", [16, 256, 4096])
def test_the_greatest_and_the_least_rate_scale_with_the_global_batch(batch):
    config = OptimizerConfig(base_lr=1.5e-4, base_min_lr=1e-5)
    found = rates(config, batch, 5, 50, [5, 50])
    assert found[5] == pytest.approx(1.5e-4 * batch / 256)
    assert found[50] == pytest.approx(1e-5 * batch / 256)


def test_a_warm_up_is_given_in_steps_or_in_epochs():
    assert OptimizerConfig(warmup_steps=7).warmup(steps_per_epoch=100) == 7
    assert OptimizerConfig(warmup_epochs=1.5).warmup(steps_per_epoch=100) == 150
    assert OptimizerConfig().warmup(steps_per_epoch=100) == 0


@pytest.mark.parametrize("name", ["joint", "factorised_encoder"])
@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_matrices_decay_and_biases_norms_and_tokens_do_not(name, layer_decay):
    model = model_of(name)
    if layer_decay:
        model.group_matcher = lambda coarse: lambda parameter: 0 if "embedding" in parameter else 1
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3, layer_decay=layer_decay), 256)
    decays = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(decays) == len(named)
    for key, parameter in named.items():
        is_vector = key.endswith("bias") or "norm" in key or "token" in key
        assert decays[id(parameter)] == (0.0 if is_vector else 0.3), key
    assert any("token" in key for key in named)


def test_one_kernel_updates_as_the_plain_formula_does():
    model = model_of()
    optimizer = build_optimizer(model, OptimizerConfig(base_lr=1e-2), 256)
    plain = copy.deepcopy(model)
    groups = [group | {"params": [], "fused": False} for group in optimizer.param_groups]
    twins = dict(zip(model.parameters(), plain.parameters(), strict=True))
    for group, ours in zip(groups, optimizer.param_groups, strict=True):
        group["params"] = [twins[parameter] for parameter in ours["params"]]
    reference = torch.optim.AdamW(groups, lr=1e-2)
    assert all(group["fused"] for group in optimizer.param_groups)
    for _ in range(5):
        for one, other in twins.items():
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    for one, other in twins.items():
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_epochs": 1.0, "warmup_steps": 1}, "one of warmup_epochs and warmup_steps"),
        ({"base_lr": 0.0}, "optimizer.base_lr must be greater than 0"),
        ({"base_min_lr": -1.0}, "optimizer.base_min_lr must not be negative"),
        ({"betas": (0.9, 1.0)}, "optimizer.betas"),
        ({"layer_decay": 1.5}, "optimizer.layer_decay"),
        ({"clip_grad": 0.0}, "optimizer.clip_grad"),
        ({"clip_grad": float("nan")}, "optimizer.clip_grad"),
        ({"clip_grad": float("inf")}, "optimizer.clip_grad"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps"),
        ({"base_lr": float("nan")}, "optimizer.base_lr"),
    ],
)
def test_values_that_cannot_train_are_refused(fields, message):
    with pytest.raises(Refused, match=message):
        OptimizerConfig(**fields).validate()


def test_every_step_sets_the_decay_of_every_group_whatever_a_checkpoint_said():
    optimizer = build_optimizer(model_of(), OptimizerConfig(weight_decay=0.3), 256)
    schedule = build_schedule(optimizer, OptimizerConfig(), 256, 2, 10)
    configured = [group["weight_decay"] for group in optimizer.param_groups]
    assert sorted(configured) == [0.0, 0.3]
    for group in optimizer.param_groups:
        group.update(weight_decay=0.7, lr=9.0)
    schedule.step_update(5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == configured
    assert all(group["lr"] < 1 for group in optimizer.param_groups)
