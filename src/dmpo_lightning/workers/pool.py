"""Worker processes that call one function and are killed when a call takes too long.

Signals do not interrupt a long operation on integers or in a C extension. The end of the process does. Only the
standard library is imported, so that workers start fast (docs/decisions/037-workers.md).
"""

import faulthandler
import logging
import multiprocessing
import os
import pickle
import queue
import reprlib
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent import futures
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from dmpo_lightning.workers.local_modules import LocalModules, local_modules

logger = logging.getLogger(__name__)
# A fork would copy the locks of torch's threads.
_CONTEXT = multiprocessing.get_context("spawn")
LIFE_SIGN = 0.5
"""Seconds after which a silent worker is looked after."""
HEARING = 5.0
"""Seconds in which a worker must begin a call, and have ended itself after the time limit. One in which a thread of an
earlier call holds everything up does neither."""


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
        function: importable by its module and name, or an instance of an importable class. Its value must be picklable.
        workers: number of processes.
        time_limit: seconds per call. None waits for ever. What the function's module imports is imported before the
            first call, and what a call imports is a part of that call. A call that is late, or ends its worker, in a
            process that has served others is made once more in a fresh one, whose word counts.

    Raises:
        ValueError: no workers, or a time limit that is not positive.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        workers: int,
        time_limit: float | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"`workers` must be at least 1, got {workers}.")
        if time_limit is not None and not time_limit > 0:
            raise ValueError(f"`time_limit` must be a positive number of seconds, got {time_limit}.")
        self.function, self.workers, self.time_limit = function, workers, time_limit
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._workers = [_Worker(self.function, self.time_limit) for _ in range(self.workers)]
        self._finalizer = weakref.finalize(self, _end_all, self._workers)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def close(self) -> None:
        """Ends the worker processes. The next call starts new ones."""
        with self._lock:
            _end_all(self._workers)

    def map(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The function's value for each tuple of arguments, or the `CallError` that came of it.

        The results are in the order of ``calls``.

        Raises:
            RuntimeError: a worker process could not start.
        """
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            idle.put(worker)

        def call(arguments: tuple[Any, ...]) -> Any:
            worker = idle.get()
            try:
                return worker.call(arguments)
            finally:
                idle.put(worker)

        # One thread waits for each worker, so that what a worker goes through can be read from top to bottom.
        with self._lock, futures.ThreadPoolExecutor(self.workers) as threads:
            for worker in self._workers:
                worker.is_stopped = False
            try:
                results = []
                for each in [threads.submit(call, arguments) for arguments in calls]:
                    # Now and then this thread looks up, since a signal that another one is given does not wake it.
                    while not each.done():
                        futures.wait([each], LIFE_SIGN)
                    results.append(each.result())
                return results
            # An interrupt leaves calls under way, for whose answers the threads would wait.
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in self._workers:
                    worker.is_stopped = True
                    worker.kill()
                raise


_Answer = tuple[bytes | None, str, Sequence[str]]
"""A pickled value, or None and what went wrong, and the names of the threads that are left running."""


class _Worker:
    """A process that is handed one call after the other, and another process once the first has ended."""

    def __init__(self, function: Callable[..., Any], time_limit: float | None) -> None:
        self.function, self.time_limit = function, time_limit
        self.process: Any = None
        self.pipe: Any = None
        self.is_stopped = False
        """Whether nothing is to be started any more."""
        self._left = ""
        """The last call of this process that left threads behind, and their names."""

    def call(self, arguments: tuple[Any, ...]) -> Any:
        """The value of a call, or how it failed. Arguments that cannot be pickled raise here, in the own process.

        An earlier call may have left a thread, a lock or a process behind that holds up a later one or ends its worker.
        So only a process that has served no other call is believed that a call did this itself.
        """
        pickled = pickle.dumps(arguments)
        suspected = None
        if self.process is not None:
            suspected = self._made(arguments, pickled, HEARING)
            if not isinstance(suspected, TimeLimitError | WorkerDiedError):
                return suspected
        left = self._left or "not known, a thread that has ended or a lock, say"
        self._start()
        result = self._made(arguments, pickled)
        if suspected is not None and not isinstance(result, TimeLimitError | WorkerDiedError):
            logger.warning(
                "A worker process was replaced and a call made anew that is not to blame (%s). What an earlier call of "
                "that process had left behind: %s.",
                suspected,
                left,
            )
        return result

    def _made(self, arguments: tuple[Any, ...], pickled: bytes, hearing: float = threading.TIMEOUT_MAX) -> Any:
        """The value of a call, or how it failed. The worker must have begun it within ``hearing`` seconds."""
        started = time.monotonic()
        limit = threading.TIMEOUT_MAX if self.time_limit is None else self.time_limit + HEARING
        answer = self._said(pickled, min(hearing, limit)) and self._said(None, limit)
        if answer is not None:
            value, problem, threads = answer
            if threads:
                self._left = f"{threads[:3]!r} of the call with {reprlib.repr(arguments)}"
            return CallError(problem) if value is None else pickle.loads(value)
        seconds, code = time.monotonic() - started, self.process.exitcode
        self.end()
        if self.time_limit is not None and seconds >= self.time_limit:
            return TimeLimitError("the call took longer than the time limit")
        how = "closed its pipe" if code is None else f"ended with exit code {code}"
        return WorkerDiedError(f"the worker process {how}")

    def _start(self) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self._left = ""
        # Pickled here, because the worker must know first where the function's module is found.
        pickled = pickle.dumps(self.function)
        self.process = _CONTEXT.Process(
            target=_serve, args=(theirs, local_modules(), pickled, self.time_limit), daemon=True
        )
        self.process.start()
        # `kill` may have come before there was a process.
        if self.is_stopped:
            self.kill()
        # Else the pipe would stay open when the process is gone.
        theirs.close()
        answer = self._said(None)
        if answer is None:
            self.end()
            raise RuntimeError(
                "A worker process ended before its first call. What it is to call must be importable, and a "
                'script that starts worker processes needs `if __name__ == "__main__":` around what it runs.'
            )
        if answer[0] is None:
            self.end()
            raise RuntimeError(f"A worker process could not start: {answer[1]}")

    def _said(self, asked: bytes | None, seconds: float = threading.TIMEOUT_MAX) -> "_Answer | None":
        """What the worker says next. None where it has ended, or is silent for so long, and was killed."""
        # Beside this thread, which also waits where the worker reads only a part of what is asked.
        guard = threading.Timer(seconds, self.kill)
        guard.start()
        try:
            if asked is not None:
                self.pipe.send_bytes(asked)
            while not self.pipe.poll(LIFE_SIGN):
                # The end of the pipe may outlive the worker, in a process that it has forked.
                if not self.process.is_alive() and not self.pipe.poll():
                    return None
            answer: _Answer = pickle.loads(self.pipe.recv_bytes())
            return answer
        except (EOFError, OSError):
            # Waits for the exit code.
            self.process.join(LIFE_SIGN)
            return None
        finally:
            guard.cancel()

    def kill(self) -> None:
        """Kills the process and what it started, which is in the group that it leads."""
        process = self.process
        if process is not None and process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()

    def end(self) -> None:
        """Kills the process and waits for its end."""
        self.kill()
        if self.process is not None:
            self.process.join()
            self.pipe.close()
        self.process = self.pipe = None


def _end_all(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.end()


def _serve(pipe: Connection, finders: Sequence[LocalModules], pickled: bytes, time_limit: float | None) -> None:
    """The life of a worker process: pickled arguments in, pickled values out, until the parent is gone."""
    # An interrupt from the keyboard is for the parent alone.
    os.setsid()
    # Else a function with a pool of its own could not start it.
    multiprocessing.current_process().daemon = False
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.meta_path.extend(finders)
    function: Callable[..., Any] | None = None

    def begin() -> None:
        nonlocal function
        function = pickle.loads(pickled)

    def call() -> Any:
        assert function is not None
        return function(*pickle.loads(asked))

    pipe.send_bytes(_answer(begin))
    nowhere, own = open(os.devnull, "w"), os.getpid()  # noqa: SIM115  as long as the process
    while True:
        try:
            asked = pipe.recv_bytes()
        # The parent has closed its end.
        except EOFError:
            return
        if time_limit is not None:
            # A thread of C, which needs no lock of the interpreter and no parent.
            faulthandler.dump_traceback_later(time_limit, exit=True, file=nowhere)
        pipe.send_bytes(_BEGUN)
        answer = _answer(call)
        # A call has forked and come back in both processes.
        if os.getpid() != own:
            os._exit(0)
        # An alarm that was left would ring in the next call.
        signal.setitimer(signal.ITIMER_REAL, 0)
        # Sending is still a part of the call: a thread that it left may hold it up.
        pipe.send_bytes(answer)
        faulthandler.cancel_dump_traceback_later()


def _answer(function: Callable[[], Any]) -> bytes:
    """The value of a function, what it raised, and the threads that it has left."""
    before = threading.enumerate()
    value, problem = None, ""
    try:
        value = pickle.dumps(function())
    # Whatever a foreign function raises is for the parent to count, an exit included.
    except BaseException as error:
        problem = described(error)
    return pickle.dumps((value, problem, [each.name for each in threading.enumerate() if each not in before]))


_BEGUN = _answer(lambda: None)


def described(error: BaseException) -> str:
    """What was raised, in words, even where the error's own words raise."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return type(error).__name__


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
