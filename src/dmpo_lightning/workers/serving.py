"""The life of a worker process: arguments in, JSON out, until the parent is gone."""

import json
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from dmpo_lightning.workers.clock import Clock
from dmpo_lightning.workers.local_modules import LocalModules, replace_local_modules


def serve(
    arguments: Connection,
    answers: Connection,
    finders: Sequence[LocalModules],
    pickled: bytes,
    time_limit: float | None,
) -> None:
    """Answers each call on a line of its own, which names the number of the call.

    Args:
        arguments: where numbers and arguments come from.
        answers: where the lines go.
        finders: of modules in the working directory of the parent.
        pickled: the function and what is called once before it, or None.
        time_limit: seconds for a call.
    """
    # An interrupt from the keyboard is for the parent alone.
    os.setsid()
    # Else a function with a pool of its own could not start it.
    multiprocessing.current_process().daemon = False
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _keep_to_oneself(arguments, answers)
    replace_local_modules(finders)
    _Service(arguments, answers, pickled, time_limit).run()


class _Service:
    """What `serve` does, with what its parts share."""

    def __init__(self, arguments: Connection, answers: Connection, pickled: bytes, time_limit: float | None) -> None:
        self.arguments, self.answers, self.pickled = arguments, answers, pickled
        self.clock = Clock(time_limit, lambda seconds: self.say(seconds=seconds))
        self.number, self.process = 0, os.getpid()
        self.function: Callable[..., Any] | None = None

    def run(self) -> None:
        self.answer(self.begin, self.pickled)
        self.clock.watch_imports()
        while True:
            try:
                pickled = self.arguments.recv_bytes()
            # The parent has closed its end.
            except EOFError:
                sys.exit()
            # As the parent counts.
            self.number += 1
            self.answer(self.call, pickled)

    def begin(self, pickled: bytes) -> None:
        self.function, initializer = pickle.loads(pickled)
        if initializer is not None:
            initializer()

    def call(self, pickled: bytes) -> Any:
        assert self.function is not None
        # Arguments may be objects of modules that are to be imported first.
        arguments = pickle.loads(pickled)
        self.clock.start()
        return self.function(*arguments)

    def answer(self, function: Callable[[bytes], Any], pickled: bytes) -> None:
        """Says what a function returned, or what it raised."""
        try:
            said = self.line(value=function(pickled))
        # Whatever a foreign function raises is for the parent to count, an exit included.
        except (Exception, SystemExit) as error:
            said = self.line(error=f"{type(error).__name__}: {error}")
        # A function that forks returns twice, and the parent waits for one answer.
        if os.getpid() != self.process:
            os._exit(0)
        self.write(said)

    def say(self, **content: Any) -> None:
        if os.getpid() == self.process:
            self.write(self.line(**content))

    def line(self, **content: Any) -> bytes:
        # A line begins behind whatever else was written to the pipe.
        return f"\n{json.dumps({'number': self.number} | content)}\n".encode()

    def write(self, said: bytes) -> None:
        while said:
            said = said[os.write(self.answers.fileno(), said) :]


def _keep_to_oneself(*pipes: Connection) -> None:
    """Closes the pipes in every process that this one starts, so that their end is the end of this one."""
    for pipe in pipes:
        os.set_inheritable(pipe.fileno(), False)
        os.register_at_fork(after_in_child=pipe.close)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
