"""Foreign text, as it may be printed: a terminal obeys what completions and names hold, so it is shown instead."""

import logging
import os
from typing import TextIO


def printable(text: str) -> str:
    """The text with its control characters and other invisible ones written out.

    Line ends and tabs stay.
    """
    return "".join(each if each.isprintable() or each in "\n\t" else escaped(each) for each in text)


def escaped(text: str) -> str:
    """The text on one line, with everything written out that is not printable."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def show_traceback(record: logging.LogRecord) -> bool:
    """A filter for loggers, which keeps every record and makes its traceback `printable`."""
    if record.exc_info:
        # Formatters take a text that is there already.
        record.exc_text = printable(logging.Formatter().formatException(record.exc_info))
    return True


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


def coloured(text: str, code: str, stream: TextIO) -> str:
    """The text in a colour (a number of SGR, such as 32 for green) where the stream is a terminal that shows colours.

    ``NO_COLOR`` in the environment forbids it (https://no-color.org).
    """
    return f"\x1b[{code}m{text}\x1b[0m" if is_terminal(stream) and not os.environ.get("NO_COLOR") else text
