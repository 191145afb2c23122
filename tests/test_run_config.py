"""What the configuration of a run refuses, and that the remedy it names is one."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.agreement import engine_hash
from pretrain.config import PretrainConfig
from pretrain.data.config import DataConfig
from pretrain.data.order import Order
from pretrain.errors import Refused


@given(
    global_batch=st.integers(1, 300),
    world=st.integers(1, 24),
    micro_batch=st.integers(1, 12),
    lanes=st.integers(1, 12),
)
def test_the_batch_that_is_named_in_a_refusal_works(global_batch, world, micro_batch, lanes):
    data = DataConfig(global_batch=global_batch * lanes, micro_batch=micro_batch, lanes=lanes)
    config = PretrainConfig(data=data)
    try:
        config.accumulation(world)
    except Refused as error:
        field, number = re.fullmatch(r"data\.(\w+): .*; use (\d+)", str(error)).groups()
        config = dataclasses.replace(config, data=dataclasses.replace(data, **{field: int(number)}))
    assert config.accumulation(world) * world * config.data.micro_batch == config.data.global_batch
    Order((4000,), seed=0, lanes=lanes, shards_per_window=1, global_batch=config.data.global_batch)


def test_two_deepspeed_files_of_one_name_are_told_apart_by_their_content(tmp_path, monkeypatch):
    hashes = []
    for stage in (1, 2):
        monkeypatch.chdir(tmp_path)
        Path("zero.json").write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
        hashes.append(engine_hash(PretrainConfig(deepspeed="zero.json"))["deepspeed"])
    assert hashes[0] != hashes[1]
    assert engine_hash(PretrainConfig()) == {}


def test_a_batch_that_does_not_divide_is_replaced_by_the_nearest_one_that_micro_batches_and_lanes_divide_too():
    config = PretrainConfig(data=DataConfig(global_batch=2048, micro_batch=32, lanes=64))
    with pytest.raises(Refused, match=r"data\.global_batch: 2048 samples do not divide among 24 processes; use 2304"):
        config.accumulation(24)
