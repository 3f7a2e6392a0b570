"""Reads JSON Lines: one value per line, lines that end at a line feed and nowhere else, in UTF-8."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOT_UTF8 = "not UTF-8 (convert the file, such as by `iconv -f latin1 -t utf-8`)"


def numbered_lines(path: str | Path) -> Iterator[tuple[int, Any, str | None]]:
    """For each line its number, its value, and what is wrong with it, which is None if it could be read.

    Blank lines are left out, and a byte order mark at the beginning is no part of the first one.
    """
    # As bytes, because Python's own lines of text end at a carriage return too, and those of `splitlines` at characters
    # such as U+2028, which JSON leaves as they are within a text.
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield number, json.loads(text), None
            except UnicodeDecodeError:
                yield number, None, NOT_UTF8
            # Deeply nested brackets end in a RecursionError, which is a bad line and no reason to stop.
            except (ValueError, RecursionError) as error:
                yield number, None, f"not JSON ({error})"
