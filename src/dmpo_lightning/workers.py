"""Calls in worker processes that are killed when they take too long.

A signal handler cannot interrupt a long operation on integers or in a C extension. Killing the process can. Only the
standard library is imported, so that workers start fast.
"""

import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

# A fork would copy the locks of torch's threads.
_CONTEXT = multiprocessing.get_context("spawn")


class CallError(RuntimeError):
    """A call raised in its worker process. The message is that of the worker."""


class TimeLimitError(CallError):
    """A call took longer than the time limit, and its worker was killed."""


class WorkerDiedError(CallError):
    """The worker process ended during a call."""


class WorkerPool:
    """One function in several processes.

    The processes start at the first call and end with the pool or the parent process. A pickled or copied pool has not
    started yet.

    Args:
        function: importable by its module and name, or an instance of an importable class. Its value must be what JSON
            can state, so that nothing that a worker sends is unpickled here.
        workers: number of processes.
        time_limit: seconds per call. None waits for ever.
        initializer: called once in each new worker. Its time does not count.

    Raises:
        ValueError: no workers, or a time limit that is not positive.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        workers: int,
        time_limit: float | None = None,
        initializer: Callable[[], object] | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"`workers` must be at least 1, got {workers}.")
        if time_limit is not None and not time_limit > 0:
            raise ValueError(f"`time_limit` must be a positive number of seconds, got {time_limit}.")
        self.function, self.workers, self.time_limit, self.initializer = function, workers, time_limit, initializer
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def close(self) -> None:
        """Ends the worker processes. The next call starts new ones."""
        with self._lock:
            _kill_all(self._workers)

    def map(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The function's value for each tuple of arguments, or the `CallError` that came of it.

        The results are in the order of ``calls``.

        Raises:
            RuntimeError: a worker process could not start.
        """
        with self._lock:
            try:
                return self._map(calls)
            # An interrupt leaves calls under way, whose answers nobody will fetch.
            except BaseException:
                _kill_all(self._workers)
                raise

    def _map(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        results: list[Any] = [None] * len(calls)
        waiting = deque(range(len(calls)))
        missing = len(calls)
        while missing:
            for worker in self._idle(len(waiting)):
                worker.send(waiting.popleft(), calls)
            for worker in self._reporting():
                call, result = worker.receive()
                if call is not None:
                    results[call] = result
                    missing -= 1
                if isinstance(result, TimeLimitError | WorkerDiedError):
                    worker.kill()
                    self._workers.remove(worker)
        return results

    def _idle(self, wanted: int) -> list["_Worker"]:
        """As many workers for new calls as are wanted and ready, after starting those that are missing."""
        busy = sum(worker.call is not None for worker in self._workers)
        while len(self._workers) < min(self.workers, busy + wanted):
            self._workers.append(_Worker(self.function, self.initializer, self.time_limit))
        return [worker for worker in self._workers if worker.is_ready and worker.call is None][:wanted]

    def _reporting(self) -> list["_Worker"]:
        """The workers that the next answer, death or time limit concerns, after waiting for it."""
        expected = [worker for worker in self._workers if worker.call is not None or not worker.is_ready]
        seconds = min((worker.seconds_left for worker in expected if worker.seconds_left is not None), default=None)
        ready = wait([worker.connection for worker in expected], seconds)
        return [worker for worker in expected if worker.connection in ready or worker.is_late]


class _Worker:
    def __init__(
        self, function: Callable[..., Any], initializer: Callable[[], object] | None, time_limit: float | None
    ) -> None:
        self.time_limit = time_limit
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs, function, initializer, time_limit), daemon=True)
        self.process.start()
        theirs.close()
        self.is_ready = False
        self.call: int | None = None
        self.deadline: float | None = None

    @property
    def seconds_left(self) -> float | None:
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0)

    @property
    def is_late(self) -> bool:
        return self.seconds_left == 0

    def send(self, call: int, calls: Sequence[tuple[Any, ...]]) -> None:
        """Hands over a call. Arguments that cannot be pickled raise here, in the caller's own process."""
        self.call = call
        self.deadline = None if self.time_limit is None else time.monotonic() + self.time_limit
        # The worker may have died, which `receive` finds out and says.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(calls[call])

    def receive(self) -> tuple[int | None, Any]:
        """The call that came to an end, and its value or error.

        The call is None where the worker reports that it has started.
        """
        call, self.call = self.call, None
        try:
            answered = self.connection.poll()
            self.deadline = None
            if not answered:
                return call, TimeLimitError("the call took longer than the time limit")
            answer = json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join()
            if not self.is_ready:
                raise RuntimeError(
                    "A worker process ended before its first call. What it is to call must be importable, and a "
                    'script that starts worker processes needs `if __name__ == "__main__":` around what it runs.'
                ) from None
            return call, WorkerDiedError(f"the worker process ended with exit code {self.process.exitcode}")
        if not self.is_ready and "error" in answer:
            raise RuntimeError(f"A worker process could not start: {answer['error']}")
        self.is_ready = True
        return call, CallError(answer["error"]) if "error" in answer else answer.get("value")

    def kill(self) -> None:
        """Ends the process and what it started."""
        # By then it leads a process group of its own.
        if self.is_ready:
            assert self.process.pid is not None
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()


def _serve(
    connection: Connection,
    function: Callable[..., Any],
    initializer: Callable[[], object] | None,
    time_limit: float | None,
) -> None:
    """The life of a worker: arguments in, JSON out, until the parent is gone."""
    # An interrupt from the keyboard is for the parent alone.
    os.setsid()
    # Else a function with a pool of its own could not start it.
    multiprocessing.current_process().daemon = False
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection.send_bytes(_answer(initializer or bool, tuple))
    while True:
        connection.send_bytes(_answer(function, connection.recv, time_limit))


def _answer(
    function: Callable[..., Any], receive: Callable[[], tuple[Any, ...]], time_limit: float | None = None
) -> bytes:
    try:
        arguments = _received(receive)
        if time_limit is not None:
            _limit_processor_time(time_limit)
        return json.dumps({"value": function(*arguments)}).encode()
    # Whatever a foreign function raises is for the parent to count.
    except Exception as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()


def _received(receive: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    try:
        return receive()
    # The parent has closed its end.
    except EOFError:
        sys.exit()


def _limit_processor_time(time_limit: float) -> None:
    """Where the parent is gone and can no longer kill, the kernel does, even in the middle of one long operation."""
    seconds = time.process_time() + 1 + time_limit * (os.cpu_count() or 1)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
