"""Lines of JSON on disk: appended whole, cut back where a run goes on from before, read in whatever state they are."""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

from dmpo_lightning.terminal import shortened

T = TypeVar("T")


def encoded(record: Mapping[str, Any]) -> bytes:
    """A record as one line. It is ASCII, so that no character within a text looks like the end of a line."""
    return json.dumps(finite(record), allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object that people may read, as `replace` does."""
    replace(path, json.dumps(finite(content), allow_nan=False, indent=2).encode("ascii") + b"\n")


def finite(value: Any) -> Any:
    """The value with None in place of each number that JSON does not have, such as NaN."""
    if isinstance(value, Mapping):
        return {str(name): finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parsed(content: bytes) -> dict[str, Any]:
    """The object that is written there, with None for NaN and infinity.

    Raises:
        ValueError: there is none, or one that was being written when a run was killed.
    """
    try:
        found = json.loads(content, parse_constant=lambda _: None)
    except RecursionError as error:
        raise ValueError("brackets are nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object but {type(found).__name__}")
    return found


def read_file(path: Path) -> dict[str, Any]:
    """The object of a JSON file. It is empty where there is none, and with a warning where it cannot be read."""
    try:
        return parsed(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        _warn_of_loss(path, [error])
        return {}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, none where there is no file. Lines that hold none are left out with a warning."""
    return made_of_lines(path, lambda record: [record])


def made_of_lines(path: Path, make: Callable[[dict[str, Any]], Iterable[T]]) -> Iterator[T]:
    """What is made of each record of a file. What ``make`` cannot work with is left out with a warning too."""
    lost: list[Exception] = []
    try:
        # A device or a pipe, to which a foreign folder may have a link, has no end.
        with path.open("rb") if path.is_file() else BytesIO() as file:
            for line in file:
                try:
                    yield from make(parsed(line))
                except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                    lost.append(error.with_traceback(None))
    except OSError as error:
        lost.append(error)
    _warn_of_loss(path, lost)


def _warn_of_loss(path: Path, errors: Sequence[Exception]) -> None:
    if errors:
        warnings.warn(shortened(f"{path}: {len(errors)} parts are left out, such as: {errors[0]}"), stacklevel=2)


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
