"""Text for terminals: foreign text, which they would obey, as it may be printed, and a line at the bottom of one."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, TextIO


def printable(text: str) -> str:
    """The text with its control characters and other invisible ones written out.

    Line ends and tabs stay.
    """
    return "".join(each if each.isprintable() or each in "\n\t" else escaped(each) for each in text)


def shown(text: str, longest: int = 20_000) -> str:
    """The beginning of a text, with what is not printable written out, such as characters that turn its direction."""
    rest = len(text) - longest
    return printable(text[:longest]) + (f" ... ({rest} more characters)" if rest > 0 else "")


def escaped(text: str) -> str:
    """The text on one line, with everything written out that is not printable."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def shortened(text: str, characters: int = 600) -> str:
    """The text on one line, of a long one a third from its beginning and the rest from its end, where answers are."""
    # Cut before it is escaped: a hostile text may have a million characters, each of which becomes ten.
    if len(text) > characters:
        head = characters // 3
        text = f"{text[:head]} ... {text[len(text) - (characters - head) :]}"
    return escaped(text)


def error_line(error: BaseException) -> str:
    """An error in one line, of a long message the first."""
    return ": ".join(filter(None, [type(error).__name__, *str(error).strip().splitlines()[:1]]))


def show_traceback(record: logging.LogRecord) -> bool:
    """A filter for loggers, which keeps every record and makes its traceback `printable`."""
    if record.exc_info:
        # Formatters take a text that is there already.
        record.exc_text = printable(logging.Formatter().formatException(record.exc_info))
    return True


def clean_messages() -> None:
    """Makes every log record and warning of this process `printable`, whoever speaks and whatever file it quotes.

    Warnings that are meant for users are shown without their place in somebody's code.
    """
    make = logging.getLogRecordFactory()

    def cleaned(*args: Any, **options: Any) -> logging.LogRecord:
        record = make(*args, **options)
        # A record whose arguments do not fit is for its handler to complain of.
        with contextlib.suppress(TypeError, ValueError):
            record.msg, record.args = printable(record.getMessage()), ()
        show_traceback(record)
        return record

    def show(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None
    ) -> None:
        is_for_users = issubclass(category, UserWarning)
        # Looked up now, because Lightning has one of its own once it is imported.
        text = f"{message}\n" if is_for_users else warnings.formatwarning(message, category, filename, lineno, line)
        print(printable(text), end="", file=file or sys.stderr)

    logging.setLogRecordFactory(cleaned)
    warnings.showwarning = show


def is_terminal(stream: TextIO) -> bool:
    """Whether a person may be looking at a stream, on a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def terminal_size(stream: TextIO) -> tuple[int, int]:
    """Columns and rows of the terminal behind a stream, 80 and 24 where it does not say."""
    try:
        columns, rows = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        columns, rows = 0, 0
    # Some terminals, such as those of containers, say that they have none.
    return columns or 80, rows or 24


class BottomLine:
    """A bar of tqdm's at the bottom of a terminal, above which everything appears that is printed meanwhile.

    Args:
        stream: of the terminal.
        interval: seconds between two states of the line, at least.
    """

    def __init__(self, stream: TextIO, interval: float) -> None:
        # Commands that show no line need not wait for it.
        from tqdm import tqdm
        from tqdm.contrib import DummyTqdmFile

        self._stream = stream
        self._widths: list[int] = []
        """Of the parts, each as long as it was at its longest, so that the others stay where they are."""
        # On a terminal that says it has no rows tqdm would draw nothing.
        rows = terminal_size(stream)[1]
        # With 0 it would wait where the share falls, as behind an evaluation that stood alone.
        self._bar = tqdm(file=stream, mininterval=interval, miniters=-1, bar_format="{desc}", nrows=rows)
        above = DummyTqdmFile(stream)
        self._streams = {name: each for name in ("stdout", "stderr") if (each := getattr(sys, name)).isatty()}
        # Handlers keep the stream that they found when they were made. Loggers whose children alone exist have none.
        loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
        handlers = [each for logger in loggers for each in getattr(logger, "handlers", [])]
        own = ((each, vars(each).get("stream")) for each in handlers)
        self._handlers = [(each, stream) for each, stream in own if stream in self._streams.values()]
        for name in self._streams:
            setattr(sys, name, above)
        for handler, _ in self._handlers:
            handler.setStream(above)

    def show(self, count: str, parts: Sequence[str], share: float | None, *, at_once: bool = False) -> None:
        """Replaces the line, if that was done long enough ago or has to be ``at_once``.

        It begins with the ``count`` of what is done, and a bar of its ``share``, where that is known. The ``parts``
        follow, the most important first. From the first that has no room on they are left out.
        """
        columns = terminal_size(self._stream)[0]
        widths = [*self._widths, *[0] * len(parts)]
        self._widths = [max(len(part), width) for part, width in zip(parts, widths, strict=False)]
        # A bar has at least four columns.
        text, room = "", columns - len(count) - (0 if share is None else 5)
        for part, width in zip(parts, self._widths, strict=False):
            if len(text) + width + 2 > room:
                break
            text += "  " + part.ljust(width)
        self._bar.n, self._bar.total, self._bar.ncols = share or 0.0, 1.0, columns
        self._bar.bar_format = f"{count}{{desc}}" if share is None else f"{count} {{bar}}{{desc}}"
        self._bar.set_description_str(text, refresh=at_once)
        self._bar.update(0)

    def close(self, *, keep: bool = False) -> None:
        """Gives the streams back. With ``keep`` the last line stays readable, else it is erased."""
        self._bar.leave = keep
        self._bar.close()
        for handler, own in self._handlers:
            handler.setStream(own)
        for name, own in self._streams.items():
            setattr(sys, name, own)
