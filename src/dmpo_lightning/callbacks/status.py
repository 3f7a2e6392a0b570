"""A line that stays at the bottom of a terminal, below all that is printed meanwhile."""

import logging
import os
import sys
from collections.abc import Iterator
from threading import RLock
from typing import Any, TextIO

from dmpo_lightning.terminal import terminal_size

ERASE = "\r\x1b[K"
"""Back to the first column, and everything from there on removed."""


class StatusLine:
    """The last line of a terminal. Open, it stands between what is printed and the terminal, so that neither breaks.

    Args:
        stream: of the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock, self._process = stream, RLock(), os.getpid()
        self._text = ""
        self._is_within_line = False
        self._replaced: list[tuple[Any, str, Any]] = []
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def open(self) -> None:
        """From here on, what is written to standard output and error appears above the line."""
        streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
        for handler in _stream_handlers():
            # Handlers keep the stream that they found when they were made.
            if handler.stream in streams.values() and handler.stream.isatty():
                self._handlers.append((handler, handler.setStream(_Above(handler.stream, self))))
        for name, stream in streams.items():
            if stream.isatty():
                self._replaced.append((sys, name, stream))
                setattr(sys, name, _Above(stream, self))

    def close(self, *, keep: bool = False) -> None:
        """Gives the streams back. With ``keep`` the last line stays readable, else it is erased."""
        with self._lock:
            self._write("\n" if keep and self._text else "" if self._is_within_line else ERASE)
            self._text = ""
        for handler, stream in self._handlers:
            handler.setStream(stream)
        for owner, name, stream in self._replaced:
            # Somebody else may have put something in its place meanwhile, and will give it back to nobody.
            if isinstance(getattr(owner, name), _Above):
                setattr(owner, name, stream)
        self._handlers, self._replaced = [], []

    @property
    def columns(self) -> int:
        """The room for a line. A terminal wraps what stands in its last column, so that this one stays free."""
        return max(terminal_size(self._stream)[0] - 1, 1)

    def draw(self, text: str) -> None:
        """Replaces the line."""
        with self._lock:
            self._text = text
            if not self._is_within_line:
                self._write(f"{ERASE}{text}")

    def write_above(self, stream: TextIO, text: str) -> int:
        """Writes what belongs above the line, which follows once a line is complete."""
        # A process that was forked meanwhile has no line of its own.
        if os.getpid() != self._process or not text:
            return stream.write(text)
        with self._lock:
            if not self._is_within_line:
                self._write(ERASE)
            written = stream.write(text)
            stream.flush()
            self._is_within_line = not text.endswith("\n")
            if not self._is_within_line:
                self._write(self._text)
        return written

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class _Above:
    """A stream whose text appears above a status line, and that is like its own stream in everything else."""

    def __init__(self, stream: TextIO, line: StatusLine) -> None:
        self._stream, self._line = stream, line

    def write(self, text: str) -> int:
        return self._line.write_above(self._stream, text)

    def writelines(self, lines: Any) -> None:
        for each in lines:
            self.write(each)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        # Loggers whose children alone exist are placeholders without handlers.
        for handler in getattr(logger, "handlers", []):
            # That of last resort looks up standard error whenever it writes, and has nothing to replace.
            if isinstance(handler, logging.StreamHandler) and "stream" in vars(handler):
                yield handler
