"""Worker processes that yield results in the order of the tasks and outlive a task that kills its worker.

`concurrent.futures` ends all workers, and gives up on every task in flight, when one worker dies (a crash inside
FFmpeg, the out-of-memory killer). Here a worker has one task at a time, so a death costs that worker and no other. Its
task is lost if it ran out of time (SIGALRM). Otherwise it is tried once more by a new one, since the memory may have
been hurt by a task before it, and lost if it kills that one too. A worker that ends by itself before its first task
ends the work instead: others would do the same, and no task is to blame.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError, wait
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, Generic, TypeVar

from pretrain.data.processes import become_worker, fork_server
from pretrain.errors import Refused, TubeletError

AHEAD = 4
"""Tasks in flight or finished but not yet taken, per worker; bounds the memory that results hold."""
CHECK_EVERY_S = 0.2
"""How long Ctrl-C may go unnoticed, in seconds."""
LONGEST_STALL_S = 86400
ENDED_BY_ITSELF = range(255)
"""Exit codes; 255 is what the fork server tells where it does not know, and is negative for a signal."""

Task = TypeVar("Task")
Result = TypeVar("Result")


class ToldToStop(KeyboardInterrupt):
    """A signal that means the end, but that nobody typed."""


class Died:
    """Stands in for the result of a task that ran out of time or killed its worker twice."""


def refuse_pool_options(jobs: int, stall_s: float) -> None:
    """Raises `Refused` for a number of processes, or for seconds without progress, that cannot be."""
    if jobs < 0:
        raise Refused(f"jobs: {jobs} does not do; use 0 or more")
    if not 0 < stall_s <= LONGEST_STALL_S:
        raise Refused(f"stall_s: {stall_s} does not do; use more than 0 and at most {LONGEST_STALL_S} seconds")


class WorkerPool(Generic[Task, Result]):
    """Runs a function over tasks in worker processes; use it as a context manager.

    The workers come from a fork server, so they inherit neither threads nor locks of this process. They end with it,
    whatever ends it. A thread keeps them busy while this process uses the results. Ctrl-C takes effect between results.
    """

    def __init__(
        self, function: Callable[[Task], Result], workers: int, stop_signals: Collection[signal.Signals] = ()
    ) -> None:
        """Takes a function that can be pickled, how many processes run it, and signals that stop as Ctrl-C does."""
        self.function, self.workers = function, workers
        self.stop_signals = (signal.SIGINT, *stop_signals)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([function.__module__])
        self.interrupted = 0

    def __enter__(self) -> "WorkerPool[Task, Result]":
        """Takes over Ctrl-C and its like, if this is the main thread, and makes the workers ready to start."""
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        try:
            fork_server()
            self.dispatcher = _Dispatcher(self.context, self.function, self.workers)
        except OSError as error:
            raise _no_worker(error) from error
        if self.in_main_thread:
            self.handlers_before = {number: signal.signal(number, self._interrupt) for number in self.stop_signals}
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the workers and gives Ctrl-C and its like back."""
        self.dispatcher.close()
        if self.in_main_thread:
            for number, handler in self.handlers_before.items():
                signal.signal(number, handler)

    def map(self, tasks: Iterable[Task]) -> Iterator[Result | Died]:
        """Yields the result of each task, in the order of the tasks.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
            ToldToStop: Another of the stop signals came.
            TubeletError: No worker can be started, or one ends before its first task.
            Exception: What the function raised.
        """
        tasks = iter(tasks)
        waiting: deque[Future[bytes | None]] = deque()
        while True:
            for task in itertools.islice(tasks, AHEAD * self.workers - len(waiting)):
                waiting.append(self.dispatcher.submit(task))
            if not waiting:
                return
            yield self._result(waiting.popleft())

    def _result(self, future: "Future[bytes | None]") -> Result | Died:
        while not self.interrupted:
            if wait([future], timeout=CHECK_EVERY_S).done:
                content = future.result()
                if content is None:
                    return Died()
                result, error = pickle.loads(content)
                if error is not None:
                    raise error
                return result
        if self.interrupted == signal.SIGINT:
            raise KeyboardInterrupt
        raise ToldToStop(signal.Signals(self.interrupted).name)

    def _interrupt(self, number: int, *_: object) -> None:
        self.interrupted = self.interrupted or number


@dataclasses.dataclass(eq=False)
class _Job:
    """A task, and where its pickled result goes: None if it killed its worker twice."""

    task: bytes
    future: "Future[bytes | None]"
    deaths: int = 0
    alone: bool = False


class _Worker:
    """A worker process, this end of what connects it, and its job, if it has one."""

    def __init__(self, context: ForkServerContext, function: Callable, lifeline: Connection) -> None:
        self.connection, theirs = context.Pipe()
        self.process: ForkServerProcess = context.Process(target=_work, args=(function, theirs, lifeline), daemon=True)
        self.process.start()
        theirs.close()
        self.started = False  # it says so, first of all
        self.job: _Job | None = None

    def end(self) -> int | None:
        """Ends the process; returns its exit code, or minus the signal that ended it."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode


class _Dispatcher:
    """The thread that gives jobs to idle workers, takes what they send and replaces those that die."""

    def __init__(self, context: ForkServerContext, function: Callable, workers: int) -> None:
        self.context, self.function, self.most_workers = context, function, workers
        self.lifeline, self.workers_end = context.Pipe(duplex=False)
        self.woken, self.wake = context.Pipe(duplex=False)
        self.submitted: deque[_Job] = deque()
        self.todo: deque[_Job] = deque()
        self.workers: list[_Worker] = []
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def submit(self, task: Any) -> "Future[bytes | None]":
        job = _Job(pickle.dumps(task), Future())
        self.submitted.append(job)
        self.wake.send_bytes(b"")
        if self.failure is not None:
            with contextlib.suppress(InvalidStateError):
                job.future.set_exception(self.failure)
        return job.future

    def close(self) -> None:
        self.wake.close()
        self.workers_end.close()
        while self.thread.is_alive():
            for worker in list(self.workers):
                worker.process.kill()  # or else the thread may wait for a worker to send all of a result
            self.thread.join(CHECK_EVERY_S)
        for worker in self.workers:
            worker.end()
        self.lifeline.close()
        self.woken.close()

    def _run(self) -> None:
        try:
            while self._wait():
                self._give()
        except BaseException as error:  # the user's thread raises it
            self.failure = error
            for job in [*self.todo, *self.submitted, *(worker.job for worker in self.workers if worker.job)]:
                with contextlib.suppress(InvalidStateError):
                    job.future.set_exception(error)

    def _wait(self) -> bool:
        """Takes jobs from the user, and from workers their results or their deaths; returns False to end."""
        waited_for: dict[Any, _Worker] = {}
        for worker in self.workers:
            # A process that a task started may hold its worker's end of the connection open after the worker has died.
            waited_for |= {worker.connection: worker, worker.process.sentinel: worker}
        for ready in connection.wait([self.woken, *waited_for]):
            if ready is self.woken:
                try:
                    self.woken.recv_bytes()
                except EOFError:  # closed
                    return False
                self.todo.append(self.submitted.popleft())
                continue
            worker = waited_for[ready]
            if worker not in self.workers:
                continue
            if worker.connection.poll():
                self._take(worker)
            elif ready is not worker.connection:
                self._bury(worker)
        return True

    def _give(self) -> None:
        """Gives out jobs, in turn, while there is an idle worker; one that is to run alone waits until all are."""
        while self.todo:
            running = [worker.job for worker in self.workers if worker.job is not None]
            if len(running) == self.most_workers or (running and (self.todo[0].alone or running[0].alone)):
                return
            worker = next((worker for worker in self.workers if worker.job is None), None)
            if worker is None:
                worker = self._new_worker()
                self.workers.append(worker)
            worker.job = self.todo.popleft()
            try:
                worker.connection.send_bytes(worker.job.task)
            except OSError:
                self._bury(worker)

    def _new_worker(self) -> _Worker:
        try:
            return _Worker(self.context, self.function, self.lifeline)
        except (EOFError, OSError) as error:  # the fork server ends when it cannot fork
            raise _no_worker(error) from error

    def _take(self, worker: _Worker) -> None:
        try:
            content = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._bury(worker)
            return
        if not worker.started:
            worker.started = True
            return
        if worker.job is not None:
            worker.job.future.set_result(content)
        worker.job = None

    def _bury(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        job, exit_code = worker.job, worker.end()
        if job is None:
            return
        if not worker.started and exit_code in ENDED_BY_ITSELF:
            self.todo.append(job)  # all that are left are told
            raise TubeletError(
                f"a worker process ends with exit code {exit_code} before its first task, see what it said above; if "
                "that was your script running once more, call Tubelet there under `if __name__ == '__main__':`, else "
                "see whether the limits of processes and memory leave room for it"
            )
        job.deaths += 1
        if job.deaths > 1 or exit_code == -signal.SIGALRM:
            job.future.set_result(None)
        else:
            # The out-of-memory killer kills, and may have meant what ran beside it.
            job.alone = exit_code == -signal.SIGKILL
            self.todo.appendleft(job)


def _no_worker(error: Exception) -> TubeletError:
    return TubeletError(
        f"a worker process cannot be started ({error}); see whether the limits of processes, files and memory leave "
        "room for it, or give fewer --jobs"
    )


def _work(function: Callable, tasks: Connection, lifeline: Connection) -> None:
    """What a worker does until this process goes away: it says that it is there, and sends what each task gives."""
    become_worker(lifeline)
    tasks.send_bytes(b"")
    while True:
        try:
            task = pickle.loads(tasks.recv_bytes())
        except (EOFError, OSError):  # its user was killed
            return
        try:
            answer = pickle.dumps((function(task), None))
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = pickle.dumps((None, error))
        tasks.send_bytes(answer)
