"""A disk that fills up while a run is recorded: one line, exit code 2, and everything before it whole.

The disk is one of its own where the tests may mount one; elsewhere a largest file size stands in for its end.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pretrain.engine.checkpoint import CheckpointConfig, Checkpoints
from pretrain.engine.checkpoint_search import find_checkpoint, step_folders
from pretrain.engine.distributed import Processes
from pretrain.engine.ownership import RunLock
from pretrain.engine.tracking import read_metrics
from pretrain.errors import DiskFull
from tests.runs import Started, run, start, tiny_pretraining

DISK_BYTES = 24 << 20
ROOM_BYTES = 300 << 10  # for the record, not for a checkpoint
SMALLEST_LIMIT_BYTES = 800  # for what a run says, not for its configuration


class Disk:
    """A small disk, or a folder whose files may not grow past a limit."""

    def __init__(self, folder: Path) -> None:
        """Mounts a small disk on the folder if that is allowed."""
        self.folder = folder
        self.limit_bytes = 0
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tubelet-drill", str(folder)]
        self.is_mounted = not os.geteuid() and not subprocess.run(mount, capture_output=True).returncode

    def fill(self, room_bytes: int) -> None:
        """Leaves room for `room_bytes`."""
        if self.is_mounted:
            ballast = bytes(shutil.disk_usage(self.folder).free - room_bytes)
            (self.folder / "ballast").write_bytes(ballast)
        else:
            self.limit_bytes = max(room_bytes, SMALLEST_LIMIT_BYTES)

    def free(self) -> None:
        """Makes all the room there was."""
        (self.folder / "ballast").unlink(missing_ok=True)
        self.limit_bytes = 0


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = Disk(folder)
    yield disk
    if disk.is_mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def recipe(packed_shards, tmp_path_factory) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)


def arguments(recipe: Path, out: Path) -> list[object]:
    larger = ["--encoder.width", 96, "--encoder.depth", 2]
    return ["--config", recipe, "--out", out, "--steps", 8, "--checkpoint.every", 4, *larger]


def assert_told_in_one_line(full: Started, where: str) -> None:
    assert full.codes == [2] * len(full.codes), full.text
    said = [line for output in full.outputs for line in output.read_text().splitlines() if line.startswith("tubelet: ")]
    assert len(said) == 1
    full_disk = (
        "no space left on the disk|.*takes about .* MiB, (as|for) .*, and no more than .* MiB are free on the disk"
    )
    assert re.search(f"{where}.*({full_disk}); free some and start again", said[0])
    assert not any("Traceback" in output.read_text() for output in full.outputs)


@pytest.mark.parametrize(("world", "options"), [(1, []), (2, ["--deepspeed", "zero2"])])
def test_a_disk_that_fills_while_saving_costs_nothing_but_the_steps_since(recipe, disk, tmp_path, world, options):
    reference, out = tmp_path / "reference", disk.folder / "run"
    if world == 1:  # that two processes resume to the bit is proved in test_resume.py
        assert run("pretrain", arguments(recipe, reference), tmp_path).code == 0
    going = start("pretrain", [*arguments(recipe, out), *options], tmp_path, world=world)
    going.wait_for((out / "checkpoints" / "step-00000004").exists)
    going.kill()
    for path in step_folders(out / "checkpoints")[1:]:  # the kill may have come late
        shutil.rmtree(path)
    disk.fill(ROOM_BYTES)
    full = run("pretrain", [*arguments(recipe, out), *options], tmp_path, world=world, limit_bytes=disk.limit_bytes)
    assert_told_in_one_line(full, "checkpoints(/step-00000008|: the next checkpoint)")
    assert find_checkpoint(out / "checkpoints", "auto").step == 4
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]
    disk.free()
    last = run("pretrain", [*arguments(recipe, out), *options], tmp_path, world=world)
    assert last.code == 0, last.text
    assert "going on from step 4" in last.text
    if world == 1:
        weights = [(folder / "encoder" / "model.safetensors").read_bytes() for folder in (reference, out)]
        assert weights[0] == weights[1]
    assert [entry["step"] for entry in read_metrics(out / "metrics.jsonl")] == list(range(1, 9))


def test_a_disk_that_fills_in_the_middle_of_the_first_save_ends_both_ranks_with_one_line(recipe, disk, tmp_path):
    checkpoints = disk.folder / "run" / "checkpoints"
    command = [*arguments(recipe, disk.folder / "run"), "--deepspeed", "zero2"]
    if not disk.is_mounted:
        disk.fill(ROOM_BYTES)
    full = start("pretrain", command, tmp_path, world=2, limit_bytes=disk.limit_bytes, sync_s=0.2)
    if disk.is_mounted:
        assert full.wait_for(lambda: list(checkpoints.glob("step-00000004.tmp-*")))
        with contextlib.suppress(OSError):  # both write at once, so the ballast may find the disk full already
            disk.fill(0)
    assert_told_in_one_line(full.wait(), "step-00000004")
    assert "no space left on the disk" in full.text
    assert list(checkpoints.iterdir()) == []


def test_a_disk_without_room_for_the_first_checkpoint_is_refused_before_the_first_step(recipe, disk, tmp_path):
    out = disk.folder / "run"
    if not disk.is_mounted:  # no disk is so large
        with Processes() as processes, pytest.raises(DiskFull, match=r"for weights and the optimiser's state"):
            Checkpoints(out / "checkpoints", processes, None, CheckpointConfig()).refuse_without_room(10**18)
        return
    disk.fill(ROOM_BYTES)
    full = run("pretrain", arguments(recipe, out), tmp_path)
    assert_told_in_one_line(full, "checkpoints: the next checkpoint")
    assert "for weights and the optimiser's state" in full.text
    assert not (out / "metrics.jsonl").exists()
    assert json.loads((out / "outcome.json").read_text())["exit_code"] == 2


def test_a_largest_file_size_that_a_checkpoint_written_beside_training_exceeds_is_told_in_one_line(recipe, tmp_path):
    beside = ["--checkpoint.background", "true"]
    full = run("pretrain", [*arguments(recipe, tmp_path / "run"), *beside], tmp_path, limit_bytes=200 << 10)
    assert_told_in_one_line(full, "step-00000004")
    assert step_folders(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_at_any_write_of_a_save_leaves_nothing_of_it_and_a_save_with_room_is_whole(disk, background):
    """Two pages more each time, until there is room for all of it."""
    room_bytes = 0
    with Processes() as processes:
        model, optimizer = processes.prepare(*small_model())
        lock = RunLock(disk.folder)
        while True:
            checkpoints = Checkpoints(disk.folder / "checkpoints", processes, lock, CheckpointConfig())
            disk.fill(room_bytes)
            said = ""
            try:
                with limited(disk.limit_bytes):
                    (checkpoints.begin if background else checkpoints.save)(1, model, optimizer, {})
                    checkpoints.finish()
            except DiskFull as error:
                said = str(error)
            if not said:
                break
            assert "step-00000001: no space left on the disk" in said
            assert list(checkpoints.folder.iterdir()) == []
            disk.free()
            room_bytes += 2 * os.sysconf("SC_PAGESIZE")
    assert room_bytes > 20_000, "several writes failed"
    assert find_checkpoint(disk.folder / "checkpoints", "auto").step == 1


def small_model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model of some pages, with its optimiser's states."""
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


@contextlib.contextmanager
def limited(size_bytes: int) -> Iterator[None]:
    """Limits the size of the files that this process writes, unless the limit is 0."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_from_the_start_is_told_in_one_line(recipe, disk, tmp_path):
    out = disk.folder / "run"
    out.mkdir()
    disk.fill(0)
    full = run("pretrain", arguments(recipe, out), tmp_path, limit_bytes=disk.limit_bytes)
    assert full.code == 2
    assert full.text.count("\n") == 1
    assert str(out) in full.text


def test_a_disk_that_fills_while_two_ranks_log_ends_both_with_one_line(recipe, tmp_path):
    out = tmp_path / "run"
    often = ["--config", recipe, "--out", out, "--steps", 40, "--checkpoint.every", 40]
    often += ["--data.decode_limit_s", 0]  # a limit on files holds for the memory of a decode child too
    full = run("pretrain", often, tmp_path, world=2, limit_bytes=4 << 10)
    assert_told_in_one_line(full, r"run/metrics\.jsonl")
    entries = read_metrics(out / "metrics.jsonl")
    assert (out / "metrics.jsonl").read_bytes().count(b"\n") == len(entries)
    assert 5 < len(entries) < 40


def test_an_encoder_that_cannot_be_exported_ends_both_ranks(recipe, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "encoder").write_text("in the way")
    failed = run("pretrain", arguments(recipe, out), tmp_path, world=2)
    assert failed.codes == [1, 1], failed.text
    assert "FileExistsError" in failed.text
    assert "Traceback" not in failed.outputs[1].read_text()
    assert find_checkpoint(out / "checkpoints", "auto").step == 4
