"""Reads JSON Lines: one value per line, lines that end at a line feed and nowhere else, in UTF-8."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def numbered_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Each line's number and value. Blank lines are left out, and a byte order mark is no part of the first one.

    Raises:
        ValueError: a line that cannot be read, named.
    """
    # As bytes, because Python's own lines of text end at a carriage return too, and those of `splitlines` at characters
    # such as U+2028, which JSON leaves as they are within a text.
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                value = json.loads(text) if text.strip() else None
            except UnicodeDecodeError as error:
                remedy = "convert the file, such as by `iconv -f latin1 -t utf-8`"
                raise ValueError(f"{path}, line {number}: not UTF-8; {remedy}.") from error
            # Deeply nested brackets end in a RecursionError.
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); mend or remove the line.") from error
            if text.strip():
                yield number, value
