"""The average of the weights: timm's, with its warm-up; shown by the model for a while, which is then as it was."""

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from pretrain.engine.averaging import AVERAGE, AverageConfig, WeightAverage
from pretrain.engine.distributed import Processes
from pretrain.errors import Refused


@pytest.fixture
def processes():
    with Processes() as processes:
        yield processes


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_timms_at_every_step(processes, warmup):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    ours = WeightAverage(model, AverageConfig(0.9, warmup), processes)
    theirs = ModelEmaV3(model, decay=0.9, use_warmup=warmup)
    for step in range(1, 40):
        change(model)
        ours.update(model, step)
        theirs.update(model, step=step)
        assert same(ours.weights(), theirs.module.state_dict())
        expected = min(1 - step ** (-2 / 3), 0.9) if warmup or step == 1 else 0.9
        assert ours.decay_at(step) == pytest.approx(expected)


def test_the_model_shows_the_average_for_a_while_and_has_its_own_weights_again_whatever_happens(processes):
    model = nn.Linear(3, 4).bfloat16()
    average = WeightAverage(nn.Linear(3, 4), AverageConfig(0.9), processes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with average.shown_by(model):
        assert all(torch.equal(value, average.weights()[name].bfloat16()) for name, value in model.state_dict().items())
    assert same(model.state_dict(), before)
    with pytest.raises(ZeroDivisionError), average.shown_by(model):
        len(before) / 0
    assert same(model.state_dict(), before)


def test_weights_in_half_precision_are_averaged_in_full(processes):
    model = nn.Linear(3, 4)
    average = WeightAverage(model, AverageConfig(0.999), processes)
    model.bfloat16()
    average.update(model, 1)
    nn.init.ones_(model.bias)
    for step in range(2, 12):
        average.update(model, step)
    assert average.weights()["bias"].dtype == torch.float32
    nn.init.zeros_(model.bias)
    before = average.weights()["bias"].clone()
    average.update(model, 12)
    assert torch.allclose(average.weights()["bias"], before * 0.999, rtol=1e-6, atol=0)


def test_a_checkpoint_without_an_average_or_with_another_is_refused(processes, tmp_path):
    from safetensors.torch import save_file

    average = WeightAverage(nn.Linear(3, 4), AverageConfig(0.9), processes)
    with pytest.raises(Refused, match=r"ema\.decay: .* was written without an average"):
        average.load(tmp_path)
    save_file({"weight": torch.zeros(4, 4)}, tmp_path / AVERAGE)
    with pytest.raises(Refused, match=rf"{AVERAGE}: is of another model"):
        average.load(tmp_path)
