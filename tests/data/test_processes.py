"""Worker processes in earnest: deaf to signals before they run a line of ours, and gone when their user is."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pretrain.data.processes import HELD_BACK
from tests.runs import ROOT, own_environment

EARLY = """
import os, signal, sys
from pretrain.data.processes import fork_server

class Witness:
    def __setstate__(self, state):  # runs while a worker unpickles its arguments, before its function is called
        print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "wave" in sys.modules, flush=True)

    def __getstate__(self):
        return {"some": "state"}

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts deaf
    worker = fork_server(["wave"]).Process(target=print, args=(Witness(),))
    worker.start()
    worker.join()
    print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""

WORKERS = """
import multiprocessing, os, sys, time
from pretrain.data.processes import become_worker, fork_server

def work(ends_with):
    become_worker(ends_with or multiprocessing.parent_process().sentinel)
    os.write(1, b"working\\n")  # in one piece, beside the other worker's
    time.sleep(1000)

if __name__ == "__main__":
    context = fork_server()
    workers_end, own_end = context.Pipe(duplex=False)
    workers = [context.Process(target=work, args=(ends_with,)) for ends_with in (workers_end, None)]
    for worker in workers:
        worker.start()
    sys.stdin.readline()
    own_end.close()
    workers[0].join(20)
    print(workers[0].exitcode, workers[1].is_alive(), flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def script(tmp_path) -> Path:
    return tmp_path / "script.py"


def test_a_worker_starts_deaf_to_ctrl_c_with_what_the_server_imported_and_its_user_is_not_deaf(script):
    script.write_text(EARLY)
    done = subprocess.run([sys.executable, str(script)], env=own_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "True True", "in the worker"
    assert lines[-1] == "True", "in its user"


def test_a_worker_outlives_signals_and_ends_when_it_is_told_to_and_when_its_user_is_killed(script):
    script.write_text(WORKERS)
    user = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=own_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with user:
        try:
            assert [user.stdout.readline() for _ in range(2)] == ["working\n"] * 2
            family = psutil.Process(user.pid).children(recursive=True)
            for number in HELD_BACK:
                for process in family:
                    process.send_signal(number)
            user.stdin.write("\n")
            user.stdin.flush()
            assert user.stdout.readline() == "1 True\n", "the one whose connection was closed has ended, not the other"
            user.kill()
            user.wait()
            _, alive = psutil.wait_procs(family, timeout=20)
            assert not alive
        finally:
            user.kill()
