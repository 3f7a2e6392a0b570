"""Lines of JSON on disk: appended whole, cut back where a run goes on from before, read in whatever state they are."""

import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

LONGEST, LARGEST = 2**24, 2**29
"""Bytes of a line, or of a file that is one object, and of a file of lines, at most. Beyond them nothing is read."""
DEEPEST = 64
"""How far objects may be nested."""


def encoded(record: Mapping[str, Any]) -> bytes:
    """A record as one line. It is ASCII, so that no character within a text looks like the end of a line."""
    return json.dumps(finite(record), allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object that people may read, as `replace` does."""
    replace(path, json.dumps(finite(content), allow_nan=False, indent=2).encode("ascii") + b"\n")


def finite(value: Any, levels: int = DEEPEST) -> Any:
    """The value with None in place of each number that JSON does not have, such as NaN.

    Raises:
        ValueError: it is nested more than that many levels deep.
    """
    if levels == 0:
        raise ValueError("nested too deeply")
    if isinstance(value, Mapping):
        return {str(name): finite(each, levels - 1) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each, levels - 1) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_object(content: bytes) -> dict[str, Any] | None:
    """The object that is written there, None for what is none, such as what was being written when a run was killed."""
    try:
        found = finite(json.loads(content))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_file(path: Path, unread: Counter[str] | None = None) -> dict[str, Any]:
    """The object of a JSON file, an empty one where there is none. What cannot be read is counted."""
    try:
        with _open(path) as file:
            content = file.read(LONGEST)
    except FileNotFoundError:
        return {}
    except OSError:
        content = b""
    found = read_object(content)
    if found is None and unread is not None:
        unread[f"{path.name}: no object"] += 1
    return found or {}


def read_lines(path: Path, unread: Counter[str] | None = None, most: int = LARGEST) -> Iterator[dict[str, Any]]:
    """The records of the first ``most`` bytes of a file. Lines that hold none, have no end or are too long are left out
    and counted.
    """
    unread = Counter() if unread is None else unread
    try:
        with _open(path) as file:
            while file.tell() < most and (line := file.readline(LONGEST)):
                record = read_object(line) if line.endswith(b"\n") else None
                if record is None:
                    unread[f"{path.name}: lines that hold no record"] += 1
                else:
                    yield record
    except FileNotFoundError:
        return
    except OSError:
        unread[f"{path.name}: no file that can be read"] += 1


def _open(path: Path) -> BinaryIO:
    """Opens a file that has an end. A foreign folder may hold a link to a device, or a pipe that nobody writes to."""
    size = path.stat().st_size
    if not path.is_file() or size > LARGEST:
        raise OSError("no file, or one that is too large")
    # What the system only pretends to have as a file has no size, and may have no end.
    return path.open("rb") if size else io.BytesIO()


def append(path: Path, data: bytes) -> None:
    """Adds whole lines to a file, behind a line that a full disk has cut off.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if file.tell() and path.is_file() and not _ends_a_line(path):
            data = b"\n" + data
        file.write(data)


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


def replace(path: Path, content: bytes) -> None:
    """Writes a file so that it is there as a whole or as it was before.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.new")
    # In a foreign folder it may be a link to a file of the user's.
    partial.unlink(missing_ok=True)
    partial.write_bytes(content)
    partial.replace(path)


def set_aside(path: Path) -> None:
    """Gives what is there another name, such as ``metrics_part1.csv``, so that nothing is overwritten.

    Raises:
        OSError: it cannot be renamed.
    """
    if path.exists():
        names = (path.with_name(f"{path.stem}_part{number}{path.suffix}") for number in count(1))
        path.rename(next(each for each in names if not each.exists()))


def keep_lines(path: Path, most: int | None) -> int:
    """Leaves the first records in a file, all of them for None, and returns how many there are then.

    Raises:
        OSError: the file cannot be changed.
    """
    kept = [encoded(record) for record in islice(read_lines(path), most)]
    if path.is_file():
        replace(path, b"".join(kept))
    return len(kept)
