"""The arithmetic of memory and checkpoints against DeepSpeed: its own estimators, what it holds, what it writes."""

import gc
import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pretrain.commandline import find_recipe
from pretrain.engine.checkpoint import CheckpointConfig
from pretrain.engine.checkpoint_size import checkpoint_bytes_of, kept_checkpoints
from pretrain.engine.distributed import Processes
from pretrain.engine.memory import Zero, read_zero, state_bytes
from pretrain.errors import Refused

WIDTH = 512
PARAMETERS = WIDTH**2 + WIDTH
BUCKET = 1_000_003  # a number that no tensor of the model has


def recipe(stage: int) -> Path:
    return find_recipe(f"zero{stage}", "deepspeed", ".json")


@pytest.fixture(scope="module")
def few_objects():
    """Hides what is there already from the garbage collector, which would look through all of it each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def storages() -> dict[int, int]:
    """Bytes of every storage that was made since, by its address."""
    gc.collect()
    found = (one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter) and one.device.type == "cpu")
    return {part.data_ptr(): part.nbytes() for part in (tensor.untyped_storage() for tensor in found)}


@pytest.mark.parametrize("world", [1, 8, 96])
def test_zero_2_in_16_bits_takes_what_deepspeed_says(world):
    _, told = estimate_zero2_model_states_mem_needs(96 * PARAMETERS, world, 1, cpu_offload=False)
    state = state_bytes(96 * PARAMETERS, world, "bf16", Zero(2))
    assert state.device - state.buffers == told


@pytest.mark.parametrize("world", [2, 8, 96])
def test_zero_3_in_16_bits_takes_what_deepspeed_says_and_what_that_leaves_out(world):
    parameters = 96 * PARAMETERS
    largest = WIDTH
    _, told, of_largest = estimate_zero3_model_states_mem_needs(
        parameters, largest, world, 1, cpu_offload=False, cpu_offload_params=False
    )
    state = state_bytes(parameters, world, "fp16", Zero(3))
    gathered, short_gradients = 2 * parameters, 2 * parameters // world
    assert state.device - state.buffers - gathered - short_gradients == told - of_largest


def test_offloading_takes_from_the_device_what_deepspeed_says():
    _, told = estimate_zero2_model_states_mem_needs(96 * PARAMETERS, 1, 1, cpu_offload=True)
    state = state_bytes(96 * PARAMETERS, 1, "bf16", Zero(2, offloads_optimizer=True))
    assert state.weights == told
    assert state.host == 16 * 96 * PARAMETERS
    without = state_bytes(96 * PARAMETERS, 4, "bf16", Zero(3))
    offloaded = state_bytes(96 * PARAMETERS, 4, "bf16", Zero(3, offloads_optimizer=True, offloads_weights=True))
    assert offloaded.device + offloaded.host == without.device


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_a_process_holds_as_many_bytes_as_are_computed(tmp_path, few_objects, stage, precision):
    file, zero = None, None
    bucket = BUCKET * (4 if precision == "fp32" else 2)
    if stage is not None:
        content = json.loads(recipe(stage).read_text())
        content["zero_optimization"]["reduce_bucket_size"] = BUCKET
        file = tmp_path / "zero.json"
        file.write_text(json.dumps(content))
        zero = read_zero(file)
    others = storages()
    in_backward: list[dict[int, int]] = []
    with Processes(precision, deepspeed=file) as processes:
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        model[0].register_full_backward_pre_hook(lambda *_: in_backward.append(storages()))
        model, optimizer = processes.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
        clips = torch.ones(1, WIDTH, dtype=next(model.parameters()).dtype if stage is not None else None)
        for _ in range(2):
            processes.accelerator.backward(model(clips).float().square().sum())
            optimizer.step()
            optimizer.zero_grad()
        held = [size for place, size in storages().items() if place not in others and size != bucket]
        expected = state_bytes(2 * PARAMETERS, 1, precision, zero)
        buckets = [size for size in in_backward[-1].values() if size == bucket]
        assert sum(buckets) == expected.buffers
        lasting = expected.weights + expected.optimizer
        if stage == 3:  # which keeps its gradients
            lasting += 2 * PARAMETERS * (4 if precision == "fp32" else 2)
        assert sum(held) == pytest.approx(lasting, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_of_deepspeed_has_as_many_bytes_as_are_computed(tmp_path, stage, precision):
    with Processes(precision, deepspeed=recipe(stage)) as processes:
        model = nn.Linear(WIDTH, WIDTH)
        model, _ = processes.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
        clips = torch.ones(1, WIDTH, dtype=next(model.parameters()).dtype)
        processes.accelerator.backward(model(clips).float().square().sum())
        model.save_checkpoint(tmp_path, tag="deepspeed", save_latest=False)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.pt"))
    assert checkpoint_bytes_of(nn.Linear(WIDTH, WIDTH), precision, recipe(stage)) == pytest.approx(written, rel=0.03)


@pytest.mark.parametrize("millions", [94, 343])  # autoencoders with ViT-B and ViT-L
def test_each_stage_of_the_recipes_takes_less_of_the_device_than_the_one_before(millions):
    taken = [state_bytes(millions * 10**6, 16, "bf16", read_zero(recipe(stage))).device for stage in (0, 1, 2)]
    assert taken == sorted(taken, reverse=True)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_file_leaves_out_is_as_deepspeed_has_it(stage):
    content = json.loads(recipe(stage).read_text())["zero_optimization"]
    theirs, ours = DeepSpeedZeroConfig(**content), read_zero(recipe(stage))
    assert ours.stage == theirs.stage == stage
    assert ours.bucket_elements == theirs.reduce_bucket_size
    assert ours.contiguous == theirs.contiguous_gradients
    assert ours.overlaps == theirs.overlap_comm
    assert ours.live_elements == min(theirs.max_live_parameters, theirs.max_reuse_distance)
    assert (ours.offloads_optimizer, ours.offloads_weights) == (False, False)
    assert (theirs.offload_optimizer, theirs.offload_param) == (None, None)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"zero_optimization": 3}', '{"zero_optimization": {"reduce_bucket_size": "x"}}']
)
def test_a_file_that_is_no_deepspeed_configuration_is_named(tmp_path, content):
    file = tmp_path / "zero.json"
    file.write_text(content)
    with pytest.raises(Refused, match=r"zero.json: is not a DeepSpeed configuration in JSON"):
        read_zero(file)


@given(
    steps=st.integers(1, 60),
    every=st.integers(1, 9),
    keep_last=st.integers(1, 4),
    times=st.none() | st.integers(1, 4),
)
def test_as_many_checkpoints_are_counted_as_pruning_leaves(steps, every, keep_last, times):
    config = CheckpointConfig(every, keep_last, times and every * times)
    there: list[int] = []
    most = 0
    saves = sorted({*range(every, steps + 1, every), steps})
    for save in saves:
        there.append(save)
        most = max(most, len(there))
        older = [step for step in there[:-keep_last] if config.keep_every and step % config.keep_every == 0]
        there = older + there[-keep_last:]
    assert kept_checkpoints(steps, config) == (len(saves), len(there), most)
