"""Worker processes that end with their parent, whatever ends it."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import Any


class WorkerPool:
    """``pool(function, argument tuples)`` yields results as they come; one worker means this process."""

    def __init__(self, workers: int):
        self.workers, self.executor = workers, None

    def __enter__(self) -> Callable[[Callable, Iterable[tuple]], Iterator[Any]]:
        if self.workers < 2:
            return lambda function, jobs: (function(*job) for job in jobs)
        # Spawned, since a process with threads must not be forked.
        self.executor = ProcessPoolExecutor(self.workers, get_context("spawn"), _obey_parent)
        return self._run

    def _run(self, function: Callable, jobs: Iterable[tuple]) -> Iterator[Any]:
        running = set()
        try:
            for job in jobs:
                running.add(self.executor.submit(function, *job))
                if len(running) > 2 * self.workers:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            raise ValueError(
                "a worker process was killed (out of memory?); give the command again with fewer --workers to go on"
            ) from None

    def __exit__(self, *_: object) -> None:
        if self.executor:
            self.executor.shutdown(wait=True, cancel_futures=True)


def _obey_parent() -> None:
    """Ctrl-C is the parent's business; and a worker whose parent was killed would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
