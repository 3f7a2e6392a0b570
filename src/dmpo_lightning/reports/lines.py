"""Lines of JSON on disk: appended whole, rotated, bounded in bytes, and cut back where a run goes on from before."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

LONGEST_LINE = 2**24
"""Bytes of a line that is read. A longer one is passed over, because it would be held in memory as a whole."""


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


def decoded(line: bytes) -> dict[str, Any] | None:
    """The record of a line, None for what is none, such as a line that was being written when the run was killed."""
    try:
        record = json.loads(line)
    # The reader goes down with the depth of a line.
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with the byte at which each begins. A file that cannot be read has none."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        start = 0
        while line := file.readline(LONGEST_LINE):
            whole = line.endswith(b"\n")
            if whole:
                yield start, line
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_LINE)
            start = file.tell()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file. Lines that hold none are left out."""
    for _, line in raw_lines(path):
        record = decoded(line)
        if record is not None:
            yield record


def append(path: Path, data: bytes) -> None:
    """Adds whole lines to a file. What a failed write has left of them is taken back.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def replace(path: Path, content: bytes) -> None:
    """Writes a file so that it is there as a whole or as it was before."""
    partial = path.with_name(f"{path.name}.new")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> bool:
    """Leaves the records for which ``keep`` holds in a file. Returns whether there was another line."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    kept = [line for _, line in raw_lines(path) if (record := decoded(line)) is not None and keep(record)]
    left = b"".join(kept)
    if left != content:
        replace(path, left)
    return left != content


class RotatedLines:
    """Numbered files of lines, the newest of which is appended to.

    A new file begins where one is full. The oldest is removed where all together have too many bytes. Each begins with
    the same header, a record of its own.

    Args:
        folder: of the files, made when the first line comes.
        stem: how their names begin.
        header: what is true of every line.
        max_bytes: of all files together.
        files: into how many files the bytes are divided.
    """

    def __init__(self, folder: Path, stem: str, *, header: Mapping[str, Any], max_bytes: int, files: int = 8) -> None:
        self.folder, self.stem = folder, stem
        self.header = encoded({"header": header})
        self.file_bytes = max_bytes // files
        self.files = files
        self.too_long = 0
        """Lines that were left out because no file could hold them."""

    def paths(self) -> list[Path]:
        """The files there are, the oldest first."""
        return sorted(self.folder.glob(f"{self.stem}-*.jsonl"))

    def keep_before(self, iteration: int) -> None:
        """Removes all lines of this buffer and later ones, which the run is about to write again.

        Raises:
            OSError: a file cannot be changed.
        """
        _keep_before(self.paths(), iteration)

    def append(self, lines: Iterable[bytes]) -> None:
        """Adds lines, none of which is cut.

        Raises:
            OSError: a file cannot be written, or the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = self.paths()
        path = paths[-1] if paths else self._path(0)
        size = path.stat().st_size if paths else 0
        waiting: list[bytes] = []
        for line in lines:
            if len(self.header) + len(line) > self.file_bytes:
                self.too_long += 1
                continue
            if size + len(line) > self.file_bytes:
                self._write(path, waiting)
                path, size, waiting = self._path(self._number(path) + 1), 0, []
            if not size:
                size = len(self.header)
                waiting = [self.header]
            waiting.append(line)
            size += len(line)
        self._write(path, waiting)

    def _write(self, path: Path, lines: list[bytes]) -> None:
        if not lines:
            return
        for oldest in [each for each in self.paths() if each != path][: -self.files + 1]:
            oldest.unlink()
        append(path, b"".join(lines))

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.stem}-{number:06d}.jsonl"

    def _number(self, path: Path) -> int:
        number = path.stem.rpartition("-")[2]
        return int(number) if number.isdecimal() else 0


def keep_before(folder: Path, iteration: int, *, ranks: int) -> None:
    """Removes lines of this buffer and later ones from the files of all ranks but the first ``ranks``.

    Raises:
        OSError: a file cannot be changed.
    """
    own = {f"rank{rank}" for rank in range(ranks)}
    for stem in {path.stem.rpartition("-")[0] for path in folder.glob("rank*-*.jsonl")} - own:
        _keep_before(sorted(folder.glob(f"{stem}-*.jsonl")), iteration)


def _keep_before(paths: list[Path], iteration: int) -> None:
    for path in reversed(paths):
        was_cut = keep_lines(path, lambda record: record.get("iteration", -1) < iteration)
        if not any("iteration" in record for record in read_lines(path)):
            path.unlink()
        # Lines come in the order of buffers, so that no earlier file has one to remove.
        elif not was_cut:
            return
