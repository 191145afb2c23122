"""Hang detection in earnest: in Python, in C code that keeps Python's lock, and in a process that is suspended."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import ROOT, own_environment

HANGS = """
import ctypes, sys, threading, time
from pathlib import Path
from pretrain.engine.watchdog import Watchdog

def hang_in_python():
    while True:
        time.sleep(0.01)

def hang_in_c_code_with_the_lock():
    ctypes.PyDLL(None).sleep(1000)

def go_on():
    with StopRequests():
        print("going", flush=True)
        for _ in range(20):
            time.sleep(0.1)
            watchdog.expect("step 2")

folder, how = sys.argv[1:]
if how == "go_on":
    from pretrain.engine.preemption import StopRequests
watchdog = Watchdog(1.0, Path(folder), 0, lambda reason: print(reason, flush=True))
with watchdog.watching():
    watchdog.expect("step 1")
    globals()[how]()
print("over")
"""


def started(tmp_path: Path, how: str) -> subprocess.Popen[str]:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    command = [sys.executable, str(script), str(tmp_path), how]
    return subprocess.Popen(command, cwd=ROOT, env=own_environment(), stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", ["hang_in_python", "hang_in_c_code_with_the_lock"])
def test_a_process_that_hangs_writes_its_stack_and_ends(tmp_path, how):
    process = started(tmp_path, how)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"in {how}\n" in (tmp_path / "stacks" / "rank-0.txt").read_text()
    if how == "hang_in_python":
        told = rf"step 1 took longer than 1 s \(stopping.hang_limit_s\); the stacks of all ranks are in {tmp_path}"
        assert re.match(told, said)


def test_a_process_that_goes_on_leaves_nothing_and_its_suspension_is_no_hang(tmp_path):
    process = started(tmp_path, "go_on")
    assert process.stdout.readline() == "going\n"
    process.send_signal(signal.SIGTSTP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    time.sleep(2)  # longer than the limit and the time to write
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "over\n")
    assert not (tmp_path / "stacks").exists()
