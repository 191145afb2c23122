"""Worker processes that yield results in the order of the tasks and outlive a task that kills its worker.

`concurrent.futures` gives up on every task in flight when one worker dies (a crash inside FFmpeg, the out-of-memory
killer). Here each of those is tried once more in a process of its own, so that only the one that dies again is lost.
"""

import contextlib
import itertools
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Generic, TypeVar

from pretrain.data.processes import become_worker, fork_server
from pretrain.errors import Refused

AHEAD = 4
"""Tasks in flight or finished but not yet taken, per worker; bounds the memory that results hold."""
CHECK_EVERY_S = 0.2
"""How long Ctrl-C may go unnoticed, in seconds."""
LONGEST_STALL_S = 86400

Task = TypeVar("Task")
Result = TypeVar("Result")


class Died:
    """Stands in for the result of a task that killed its worker twice."""


def refuse_pool_options(jobs: int, stall_s: float) -> None:
    """Raises `Refused` for a number of processes, or for seconds without progress, that cannot be."""
    if jobs < 0:
        raise Refused(f"jobs: {jobs} does not do; use 0 or more")
    if not 0 < stall_s <= LONGEST_STALL_S:
        raise Refused(f"stall_s: {stall_s} does not do; use more than 0 and at most {LONGEST_STALL_S} seconds")


class WorkerPool(Generic[Task, Result]):
    """Runs a function over tasks in worker processes; use it as a context manager.

    The workers come from a fork server, so they inherit neither threads nor locks of this process. They end with it,
    whatever ends it. Ctrl-C takes effect between results, never inside the machinery that it could leave locked.
    """

    def __init__(self, function: Callable[[Task], Result], workers: int) -> None:
        """Takes a function that can be pickled, and how many processes run it."""
        self.function, self.workers = function, workers
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["__main__", function.__module__])
        self.interrupted = False

    def __enter__(self) -> "WorkerPool[Task, Result]":
        """Takes over Ctrl-C, if this is the main thread, and makes the workers ready to start."""
        self.lifeline, self.workers_end = self.context.Pipe(duplex=False)
        self.executor = self._executor(self.workers)
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        if self.in_main_thread:
            self.handler_before = signal.signal(signal.SIGINT, self._interrupt)
            fork_server()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Ends the workers, at once if something failed, and gives Ctrl-C back."""
        if failure is not None:
            self.workers_end.close()
            # A worker may die halfway through sending a result. The executor, which reads it, learns that no more will
            # come only if this process does not hold the writing end as well.
            self.executor._result_queue._writer.close()  # type: ignore[attr-defined]
        self.executor.shutdown(cancel_futures=True)
        self.workers_end.close()
        self.lifeline.close()
        if self.in_main_thread:
            signal.signal(signal.SIGINT, self.handler_before)

    def map(self, tasks: Iterable[Task]) -> Iterator[Result | Died]:
        """Yields the result of each task, in the order of the tasks.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        tasks = iter(tasks)
        waiting: deque[tuple[Task, Future[Result]]] = deque()
        while True:
            for task in itertools.islice(tasks, AHEAD * self.workers - len(waiting)):
                waiting.append((task, self._submit(task)))
            if not waiting:
                return
            task, future = waiting.popleft()
            try:
                result: Result | Died = self._result(future)
            except BrokenProcessPool:
                result = self._alone(task)
            yield result

    def _result(self, future: "Future[Result]") -> Result:
        while not self.interrupted:
            if wait([future], timeout=CHECK_EVERY_S).done:
                return future.result()
        raise KeyboardInterrupt

    def _submit(self, task: Task) -> "Future[Result]":
        with contextlib.suppress(BrokenProcessPool):
            return self.executor.submit(self.function, task)
        self.executor = self._executor(self.workers)
        return self.executor.submit(self.function, task)

    def _alone(self, task: Task) -> Result | Died:
        executor = self._executor(1)
        try:
            return self._result(executor.submit(self.function, task))
        except BrokenProcessPool:
            return Died()
        finally:
            executor.shutdown(wait=False)

    def _executor(self, workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            workers, mp_context=self.context, initializer=become_worker, initargs=(self.lifeline,)
        )

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True
