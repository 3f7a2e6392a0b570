"""Lines of JSON on disk: appended whole, cut back where a run goes on from before, read in whatever state they are."""

import json
import math
from collections.abc import Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any


def encoded(record: Mapping[str, Any]) -> bytes:
    """A record as one line. It is ASCII, so that no character within a text looks like the end of a line.

    The record has no number that is not `finite`.
    """
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def finite(value: Any) -> Any:
    """The value with None in place of each number that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(name): finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_object(content: bytes) -> dict[str, Any] | None:
    """The object that is written there, None for what is none, such as what was being written when a run was killed."""
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_file(path: Path) -> dict[str, Any]:
    """The object of a JSON file, an empty one where there is none."""
    try:
        return read_object(path.read_bytes()) or {}
    except OSError:
        return {}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file. Lines that hold none, or have no end, are left out."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        for line in file:
            if line.endswith(b"\n") and (record := read_object(line)) is not None:
                yield record


def append(path: Path, data: bytes) -> None:
    """Adds whole lines to a file.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(data)


def replace(path: Path, content: bytes) -> None:
    """Writes a file so that it is there as a whole or as it was before.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.new")
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
