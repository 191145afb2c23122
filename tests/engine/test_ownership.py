"""One job at a time owns a run folder."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from pretrain.engine.ownership import RunLock
from pretrain.errors import Refused


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def write_lock(folder: Path, **changes: object) -> None:
    """Leaves a lock as another process would: by default this process's parent, which lives."""
    parent = psutil.Process(os.getppid())
    owner = {"attempt": 3, "host": socket.gethostname(), "pid": parent.pid, "started": parent.create_time(), "job": ""}
    (folder / "run.lock").write_text(json.dumps(owner | changes))


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_the_first_attempt_is_number_one_and_each_release_lets_the_next_in(tmp_path):
    first = RunLock(tmp_path)
    assert (first.owner.attempt, first.owner.pid) == (1, os.getpid())
    assert first.is_held()
    first.release()
    assert RunLock(tmp_path).owner.attempt == 2


def test_a_second_starter_is_refused_by_the_owners_process_and_host(tmp_path):
    write_lock(tmp_path, job="812")
    before = (tmp_path / "run.lock").read_bytes()
    with pytest.raises(Refused, match=rf"process {os.getppid()} on {socket.gethostname()} \(job 812\) is writing"):
        RunLock(tmp_path)
    assert (tmp_path / "run.lock").read_bytes() == before


def test_the_lock_of_a_dead_process_is_taken_over_with_the_next_attempt(tmp_path):
    write_lock(tmp_path, pid=dead_pid())
    assert RunLock(tmp_path).owner.attempt == 4


def test_a_live_process_that_only_inherited_the_number_does_not_hold_the_run(tmp_path):
    write_lock(tmp_path, started=psutil.Process(os.getppid()).create_time() - 3600)
    assert RunLock(tmp_path).owner.attempt == 4


def test_an_owner_on_another_host_counts_as_alive_until_it_releases(tmp_path):
    write_lock(tmp_path, host="elsewhere", pid=dead_pid())
    with pytest.raises(Refused, match="on elsewhere is writing"):
        RunLock(tmp_path)
    write_lock(tmp_path, host="elsewhere", pid=dead_pid(), released=True)
    assert RunLock(tmp_path).owner.attempt == 4


def test_a_requeued_job_takes_over_its_own_lock_and_another_job_or_the_same_start_does_not(tmp_path, monkeypatch):
    write_lock(tmp_path, host="elsewhere", job="812", restarts=1)
    monkeypatch.setenv("SLURM_JOB_ID", "813")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(Refused, match=r"\(job 812\)"):
        RunLock(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(Refused, match=r"\(job 812\)"):
        RunLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    taken = RunLock(tmp_path)
    assert (taken.owner.attempt, taken.owner.job, taken.owner.restarts) == (4, "812", 2)


def test_a_second_start_in_one_job_never_takes_the_run_from_a_live_process_of_this_host(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    for restarts in ("", "0", "1"):
        write_lock(tmp_path, job="812")
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with pytest.raises(Refused, match=rf"process {os.getppid()} on .* \(job 812\) is writing"):
            RunLock(tmp_path)


def test_an_owner_that_ended_but_whose_parent_has_not_noticed_is_dead(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(child.pid)
    write_lock(tmp_path, pid=child.pid, started=process.create_time())
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert RunLock(tmp_path).owner.attempt == 4
    child.wait()


def test_a_starter_waits_while_another_one_reads_and_writes_the_lock(tmp_path):
    with open(tmp_path / ".run.lock", "w") as guard, ThreadPoolExecutor(1) as pool:
        fcntl.flock(guard, fcntl.LOCK_EX)
        starting = pool.submit(RunLock, tmp_path)
        time.sleep(0.2)
        write_lock(tmp_path)
        guard.close()
        with pytest.raises(Refused, match="is writing to this run"):
            starting.result()


def test_an_owner_that_was_taken_over_knows_it_and_does_not_free_the_new_owners_lock(tmp_path):
    lost = RunLock(tmp_path)
    write_lock(tmp_path, attempt=2)
    assert not lost.is_held()
    lost.release()
    assert json.loads((tmp_path / "run.lock").read_text())["attempt"] == 2
    assert "released" not in json.loads((tmp_path / "run.lock").read_text())


@pytest.mark.parametrize("content", ["", "[1]", '{"attempt": 1}', "not json"])
def test_a_file_that_is_no_lock_is_refused_by_name(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    with pytest.raises(Refused, match=r"run\.lock: is not a lock that Tubelet wrote"):
        RunLock(tmp_path)
