"""The time limit of a call, as its worker process sees it: imports do not count."""

import builtins
import importlib
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any

IMPORT_LIMIT = 300.0
"""Seconds for one import, which may be of a large library from a slow disk."""


class Clock(MetaPathFinder):
    """Says to the parent how long it shall wait from now on, at the start of a call and around imports.

    A score function often imports a library where it needs it. That happens in the first call of each process, so a
    limit made for calls would kill every process in its first one.

    Args:
        time_limit: seconds for a call. None says nothing.
        say: tells the parent a number of seconds.
    """

    def __init__(self, time_limit: float | None, say: Callable[[float], None]) -> None:
        self.time_limit, self.say = time_limit, say
        self._left = self._since = 0.0
        self._depth, self._importing = 0, False
        self._thread = threading.get_ident()

    def start(self) -> None:
        """A call begins."""
        if self.time_limit is not None:
            self._go_on(self.time_limit)

    def watch_imports(self) -> None:
        """From now on the clock stands still while this process imports a module that was not loaded yet."""
        # The first finder is asked for every such module. It finds none.
        sys.meta_path.insert(0, self)
        builtins.__import__ = self._around(builtins.__import__)
        importlib.import_module = self._around(importlib.import_module)

    def find_spec(self, *_: Any) -> None:
        """A module is about to be imported that was not loaded yet."""
        if self._depth and not self._importing and self.time_limit is not None and self._is_mine():
            self._importing = True
            self._left -= time.monotonic() - self._since
            self._allow(max(IMPORT_LIMIT, self.time_limit))

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def importing(*arguments: Any, **options: Any) -> Any:
            if not self._is_mine():
                return function(*arguments, **options)
            self._depth += 1
            try:
                return function(*arguments, **options)
            finally:
                self._depth -= 1
                if self._importing and not self._depth:
                    self._importing = False
                    self._go_on(max(self._left, 0.0))

        return importing

    def _is_mine(self) -> bool:
        """Whether this is the thread of the calls: others would speak between its words."""
        return threading.get_ident() == self._thread

    def _go_on(self, seconds: float) -> None:
        self._left, self._since = seconds, time.monotonic()
        self._allow(seconds)

    def _allow(self, seconds: float) -> None:
        _limit_processor_time(seconds)
        self.say(seconds)


def _limit_processor_time(time_limit: float) -> None:
    """Where the parent is gone and can no longer kill, the kernel does, even in the middle of one long operation."""
    seconds = time.process_time() + 1 + time_limit * (os.cpu_count() or 1)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), resource.getrlimit(resource.RLIMIT_CPU)[1]))
