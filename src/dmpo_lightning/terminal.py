"""Foreign text, as it may be printed: a terminal obeys what completions and names hold, so it is shown instead."""

import logging


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
