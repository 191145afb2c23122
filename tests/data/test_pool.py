"""The pool of the commands that go through many videos: what a task that kills its worker costs, and what is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.data.pool import Died, WorkerPool

ROOT = Path(__file__).resolve().parents[2]

STOPS_WHILE_RESULTS_ARE_SENT = """
import time
from pretrain.data.pool import WorkerPool
def large(number):
    return bytes(60_000_000)
if __name__ == "__main__":
    for attempt in range(8):
        try:
            with WorkerPool(large, 1) as pool:
                for _ in pool.map(range(6)):
                    time.sleep(0.004 * attempt)
                    raise KeyError
        except KeyError:
            print("ended")
"""


def test_a_pool_ends_though_a_worker_dies_halfway_through_sending_a_result(tmp_path):
    script = tmp_path / "stops.py"
    script.write_text(STOPS_WHILE_RESULTS_ARE_SENT)
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ended") == 8


def note_and_perhaps_die(task: tuple[Path, int, int | None]) -> int:
    folder, number, deadly_signal = task
    with open(folder / str(number), "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.05)
    if deadly_signal is not None:
        os.kill(os.getpid(), deadly_signal)
    return number


@pytest.mark.parametrize(("deadly_signal", "tries"), [(signal.SIGSEGV, 2), (signal.SIGALRM, 1), (signal.SIGKILL, 2)])
def test_a_task_that_dies_costs_its_worker_only_and_no_other_task_runs_twice(tmp_path, deadly_signal, tries):
    deadly = {3, 9}
    tasks = [(tmp_path, number, deadly_signal if number in deadly else None) for number in range(20)]
    with WorkerPool(note_and_perhaps_die, 3) as pool:
        results = list(pool.map(tasks))
    assert [isinstance(result, Died) for result in results] == [number in deadly for number in range(20)]
    runs = {number: (tmp_path / str(number)).read_text().split() for number in range(20)}
    assert {number: len(processes) for number, processes in runs.items()} == {
        number: tries if number in deadly else 1 for number in range(20)
    }
    assert len({process for processes in runs.values() for process in processes}) <= 3 + 2 * tries


def fail(number: int) -> int:
    raise ZeroDivisionError(f"task {number}")


def test_what_a_task_raises_arrives_with_the_worker_s_traceback():
    with WorkerPool(fail, 1) as pool, pytest.raises(ZeroDivisionError, match="task 0") as caught:
        list(pool.map(range(3)))
    assert "in fail" in caught.value.__notes__[0]


def test_workers_go_on_while_a_result_is_used(tmp_path):
    with WorkerPool(note_and_perhaps_die, 1) as pool:
        results = pool.map((tmp_path, number, None) for number in range(4))
        next(results)
        end_s = time.monotonic() + 20
        while len(list(tmp_path.iterdir())) < 4 and time.monotonic() < end_s:
            time.sleep(0.01)
        assert len(list(tmp_path.iterdir())) == 4
        assert list(results) == [1, 2, 3]


def leave_a_process_and_die(folder: Path) -> None:
    """Starts a process that holds all that this one has open, as some libraries do, and crashes."""
    if os.fork() == 0:
        (folder / str(os.getpid())).touch()
        time.sleep(40)
        os._exit(0)
    while not list(folder.iterdir()):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGSEGV)


def test_the_death_of_a_worker_is_noticed_though_a_process_that_it_started_lives_on(tmp_path):
    start_s = time.monotonic()
    with WorkerPool(leave_a_process_and_die, 1) as pool:
        (result,) = pool.map([tmp_path])
    assert isinstance(result, Died)
    assert time.monotonic() - start_s < 30
    for left in tmp_path.iterdir():
        os.kill(int(left.name), signal.SIGKILL)


STARTS_NO_WORKER = """
import resource
from multiprocessing import forkserver
from pretrain.data.pool import WorkerPool
from pretrain.data.processes import fork_server
from pretrain.errors import TubeletError
if __name__ == "__main__":
    first = fork_server().Process(target=abs, args=(1,))  # once it has run, the server needs no further file to start
    first.start()
    first.join()
    try:
        with WorkerPool(abs, 1) as pool:
            resource.prlimit(forkserver._forkserver._forkserver_pid, resource.RLIMIT_NOFILE, (3, 3))
            list(pool.map([-1]))
    except TubeletError as error:
        print(error)
"""


def test_a_pool_that_can_start_no_worker_says_so_instead_of_waiting(tmp_path):
    script = tmp_path / "starts_none.py"
    script.write_text(STARTS_NO_WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=30)
    assert result.stdout.startswith("a worker process cannot be started ("), result.stderr


def test_a_script_that_its_workers_cannot_import_is_told_so_and_ends(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from pretrain.data.pool import WorkerPool\nwith WorkerPool(abs, 1) as pool:\n    print(list(pool.map([-1])))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "call Tubelet there under `if __name__ == '__main__':`" in result.stderr.splitlines()[-1]
