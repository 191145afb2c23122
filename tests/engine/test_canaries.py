"""What we rely on inside accelerate and DeepSpeed without their promising it; an upgrade that changes it fails here.

Each test says which of our lines depends on it. Where a library has mended what we work around, the line may go.
"""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from pretrain.commandline import find_recipe
from pretrain.engine.distributed import Processes
from pretrain.engine.manifest import Saved
from pretrain.engine.rank_files import _taken_from
from pretrain.engine.universal import CLIENT_STATE, TAG, convert
from tests.runs import own_environment


def zero(stage: int, **options: Any) -> Processes:
    return Processes(deepspeed=find_recipe(f"zero{stage}", "deepspeed", ".json"), **options)


def engine_of(processes: Processes) -> tuple[Any, Any]:
    """An engine and its optimiser with two groups of parameters."""
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    groups = [
        {"params": [model[0].weight], "weight_decay": 0.5},
        {"params": [model[0].bias, *model[1].parameters()], "weight_decay": 0.0},
    ]
    return processes.prepare(model, torch.optim.AdamW(groups, lr=0.1))


def step(processes: Processes, engine: Any) -> None:
    processes.accelerator.backward(engine(torch.ones(2, 5)).square().sum())


BELIEFS = """
import os
os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
content = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 1}}
accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=content))
print("believes in", accelerator.distributed_type.value)
"""


def test_accelerate_told_of_the_cpu_still_forgets_deepspeed_without_a_word():
    """Why `Processes.__init__` passes `cpu=None` under DeepSpeed, and why `_check_beliefs` looks at the type."""
    told = subprocess.run(
        [sys.executable, "-c", BELIEFS], env=own_environment(), capture_output=True, text=True, timeout=200
    )
    assert "believes in " in told.stdout, told.stderr
    assert "believes in DEEPSPEED" not in told.stdout


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_backward_takes_the_optimiser_step_and_the_prepared_optimiser_takes_none(stage):
    """`Trainer._step` calls `optimizer.step()` in every engine; under DeepSpeed it must do nothing."""
    with zero(stage) as processes:
        engine, optimizer = engine_of(processes)
        before = engine.global_steps
        step(processes, engine)
        assert engine.global_steps == before + 1
        optimizer.step()
        optimizer.zero_grad()
        assert engine.global_steps == before + 1


def test_the_groups_of_the_prepared_optimiser_are_those_that_deepspeed_steps_with():
    """`Checkpoints.load` and `StepSchedule` set rates and decays in `optimizer.param_groups`."""
    for stage in (1, 2, 3):
        with zero(stage) as processes:
            engine, optimizer = engine_of(processes)
            for group, inner in zip(optimizer.param_groups, engine.optimizer.optimizer.param_groups, strict=True):
                assert group is inner
            assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def saved_by(engine: Any, folder: Path, stage: int) -> Saved:
    engine.save_checkpoint(folder / "step", tag=TAG, client_state=CLIENT_STATE, save_latest=False)
    return Saved(folder / "step", 1, {"engine": {"name": f"DeepSpeed ZeRO {stage}", "world": 1}})


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_is_made_of_the_files_that_the_protocol_expects(tmp_path, stage):
    """`Checkpoints._is_own` and `_needed` know DeepSpeed's file names; `save_latest=False` writes no other file."""
    with zero(stage) as processes:
        engine, _ = engine_of(processes)
        step(processes, engine)
        saved_by(engine, tmp_path, stage)
    names = {str(path.relative_to(tmp_path / "step")) for path in (tmp_path / "step").rglob("*.*")}
    model = {1: "mp_rank_00_model_states.pt", 3: "zero_pp_rank_0_mp_rank_00_model_states.pt"}[stage]
    scripts = {"zero_to_fp32.py", "zero_to_torch.py"} & names
    assert names - scripts == {f"deepspeed/{model}", "deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_that_deepspeed_writes_it_hands_to_its_checkpoint_engine_but_for_two_scripts(tmp_path, stage):
    """`RankFiles` takes it there, to copy it and to write it later by the same method."""
    with zero(stage) as processes:
        engine, _ = engine_of(processes)
        step(processes, engine)
        before = engine.checkpoint_engine
        taken = []
        with _taken_from(engine.checkpoint_engine, lambda write, content, path: taken.append((write, content, path))):
            engine.save_checkpoint(tmp_path, tag=TAG, client_state=CLIENT_STATE, save_latest=False)
        written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert written <= {"zero_to_fp32.py", "zero_to_torch.py"}
        for write, content, path in taken:
            write(content, path)
        assert all(path.is_file() for _, _, path in taken)
        assert len(taken) == (2 if stage else 1)
        assert engine.checkpoint_engine is before
        assert "save" not in vars(before)
        assert not before.is_decoupled(), "which writes after it said that it had"


def test_copies_keep_what_shares_memory_shared_and_use_their_memory_again():
    """`RankFiles.copy` counts on `DefaultStager` for both; DeepSpeed's parameters are views of one flat tensor."""
    stager = DefaultStager(StagingOptions(False, False, False, False))
    flat = torch.arange(6.0)
    content = {"parts": [flat[:2], flat[2:].view(2, 2)], "number": torch.tensor(1), "decay": 0.5}
    first = stager.stage(content)
    flat += 1
    assert torch.equal(first["parts"][1], torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
    places = [part.untyped_storage().data_ptr() for part in first["parts"]]
    assert places[0] == places[1] != flat.untyped_storage().data_ptr()
    second = stager.stage(content)
    assert [part.untyped_storage().data_ptr() for part in second["parts"]] == places
    assert torch.equal(second["parts"][0], flat[:2])


def test_the_universal_format_can_be_asked_for_at_loading_and_gives_zero_3_one_decay_and_one_counter_for_all(tmp_path):
    """`load_universal` sets `engine._config.load_universal_checkpoint`, and mends the decay and Adam's counter."""
    with zero(3) as processes:
        engine, optimizer = engine_of(processes)
        step(processes, engine)
        convert(saved_by(engine, tmp_path, 3), tmp_path / "universal")
        assert engine.load_universal_checkpoint() is False
        engine._config.load_universal_checkpoint = True
        assert engine.load_universal_checkpoint() is True
        engine.load_checkpoint(tmp_path / "universal", tag=TAG)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5], "the caller may stop mending"
        counters = [state["step"] for state in engine.optimizer.optimizer.state.values()]
        assert counters[0] is counters[1], "load_universal may stop mending"


def test_another_number_of_processes_is_still_refused_by_deepspeed_itself():
    """Why `Checkpoints.load` converts; should DeepSpeed learn it, the conversion may go."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    source = inspect.getsource(DeepSpeedEngine._load_zero_checkpoint)
    assert "self.loaded_checkpoint_dp_world_size" in source
    assert "raise ZeRORuntimeException" in source


def test_the_converter_reads_the_arguments_that_it_is_given():
    """`convert` fills in the options of the converter's command line by name."""
    from deepspeed.checkpoint import ds_to_universal

    options = inspect.getsource(ds_to_universal.parse_arguments)
    for name in (
        "input_folder",
        "output_folder",
        "num_extract_workers",
        "num_merge_workers",
        "keep_temp_folder",
        "strict",
        "inject_missing_state",
    ):
        assert name in options


def test_the_kernel_that_spins_can_be_left_uncompiled_and_is_asked_for_by_its_name():
    """`_spare_compiler` marks `deepspeed_shm_comm` as one that does not fit this machine."""
    import deepspeed.ops
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm"
    assert ShareMemCommBuilder.NAME in deepspeed.ops.__compatible_ops__
    backend = importlib.import_module("deepspeed.comm.torch")
    assert "deepspeed.ops.__compatible_ops__.get(builder.NAME, False)" in inspect.getsource(backend)


def test_a_process_group_can_be_left_and_another_run_started_in_the_same_process():
    """`Processes.__exit__` resets accelerate's shared states by private names."""
    for _ in range(2):
        with zero(1) as processes:
            engine, _ = engine_of(processes)
            step(processes, engine)
        assert not torch.distributed.is_initialized()
        assert "ACCELERATE_USE_DEEPSPEED" not in os.environ


def test_deepspeed_accumulates_as_often_as_it_is_told_before_it_steps():
    """`Trainer._step` counts on `accelerator.sync_gradients` and DeepSpeed's boundary to agree."""
    with zero(2, accumulation=2) as processes:
        engine, _ = engine_of(processes)
        boundaries = []
        for _ in range(4):
            with processes.accelerator.accumulate(engine):
                step(processes, engine)
                boundaries.append((processes.accelerator.sync_gradients, engine.global_steps))
        assert boundaries == [(False, 0), (True, 1), (False, 1), (True, 2)]
