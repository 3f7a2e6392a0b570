"""Calls in worker processes that are killed when they take too long.

A signal handler cannot interrupt a long operation on integers or in a C extension. Killing the process can. Only the
standard library is imported, so that workers start fast.
"""

import json
import multiprocessing
import os
import pickle
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from dmpo_lightning.workers.local_modules import local_modules
from dmpo_lightning.workers.serving import serve

# A fork would copy the locks of torch's threads.
_CONTEXT = multiprocessing.get_context("spawn")
LIFE_SIGN = 0.5
"""Seconds after which a silent worker is looked after."""
LONGEST_ANSWER = 2**26
"""Bytes of an answer."""


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
        time_limit: seconds per call, without the imports that it makes. None waits for ever.
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
                ended = worker.receive()
                if ended is None:
                    continue
                call, result = ended
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
        seconds = min(
            (worker.seconds_left for worker in expected if worker.seconds_left is not None), default=LIFE_SIGN
        )
        ready = wait([worker.answers for worker in expected], min(seconds, LIFE_SIGN))
        return [worker for worker in expected if worker.answers in ready or worker.is_late or not worker.is_alive]


class _Worker:
    """One process, which is handed calls and says how they ended, each answer with the number of its call."""

    def __init__(
        self, function: Callable[..., Any], initializer: Callable[[], object] | None, time_limit: float | None
    ) -> None:
        theirs, self.arguments = _CONTEXT.Pipe(duplex=False)
        self.answers, mouth = _CONTEXT.Pipe(duplex=False)
        # Pickled here, because the worker must know first where the function's module is found.
        calls = pickle.dumps((function, initializer))
        self.process = _CONTEXT.Process(
            target=serve, args=(theirs, mouth, local_modules(), calls, time_limit), daemon=True
        )
        self.process.start()
        # Else the pipes would stay open when the process is gone.
        theirs.close()
        mouth.close()
        self.is_ready = False
        self.call: int | None = None
        self.deadline: float | None = None
        self._number, self._heard = 0, b""

    @property
    def seconds_left(self) -> float | None:
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0)

    @property
    def is_late(self) -> bool:
        return self.seconds_left == 0

    @property
    def is_alive(self) -> bool:
        """Whether the process runs. Its pipe may outlive it, in a process that it has forked."""
        return self.process.is_alive()

    def send(self, call: int, calls: Sequence[tuple[Any, ...]]) -> None:
        """Hands over a call. Arguments that cannot be pickled raise here, in the caller's own process."""
        pickled = pickle.dumps(calls[call])
        self.call = call
        self._number += 1
        # The worker may have died, which `receive` finds out and says.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.arguments.send_bytes(pickled)

    def receive(self) -> tuple[int, Any] | None:
        """The call that came to an end, and its value or error. None where no call did."""
        # Asked before listening: what a process has said before its death is heard below.
        is_alive = self.is_alive
        heard = self._listen()
        for answer in self._answers():
            if "seconds" in answer:
                self.deadline = time.monotonic() + answer["seconds"]
            elif self.is_ready:
                return self._ended(CallError(answer["error"]) if "error" in answer else answer.get("value"))
            elif "error" in answer:
                raise RuntimeError(f"A worker process could not start: {answer['error']}")
            else:
                self.is_ready = True
        if heard == b"" or (heard is None and not is_alive):
            return self._died()
        if len(self._heard) > LONGEST_ANSWER:
            return self._ended(WorkerDiedError(f"the worker process wrote {LONGEST_ANSWER} bytes without an answer"))
        return self._ended(TimeLimitError("the call took longer than the time limit")) if self.is_late else None

    def _listen(self) -> bytes | None:
        """What the worker has written since, empty where its end is closed. None where there is nothing."""
        if not self.answers.poll():
            return None
        heard = os.read(self.answers.fileno(), 2**16)
        self._heard += heard
        return heard

    def _answers(self) -> Iterator[dict[str, Any]]:
        """The answers to the call under way. All else that stands on the pipe is left out.

        A score function may fork, and a library may write to a file that it has closed, whose number is the pipe's now.
        """
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            # Not JSON, or no text at all.
            with suppress(ValueError):
                answer = json.loads(line)
                is_answer = isinstance(answer, dict) and not answer.keys().isdisjoint(("value", "error", "seconds"))
                if is_answer and answer.get("number") == self._number:
                    yield answer

    def _ended(self, result: Any) -> tuple[int, Any] | None:
        call, self.call, self.deadline = self.call, None, None
        return None if call is None else (call, result)

    def _died(self) -> tuple[int, Any] | None:
        self.process.join(LIFE_SIGN)
        if not self.is_ready:
            raise RuntimeError(
                "A worker process ended before its first call. What it is to call must be importable, and a "
                'script that starts worker processes needs `if __name__ == "__main__":` around what it runs.'
            )
        code = self.process.exitcode
        how = "closed its pipe" if code is None else f"ended with exit code {code}"
        return self._ended(WorkerDiedError(f"the worker process {how}"))

    def kill(self) -> None:
        """Ends the process and what it started."""
        # By then it leads a process group of its own.
        if self.is_ready:
            assert self.process.pid is not None
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.arguments.close()
        self.answers.close()


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
