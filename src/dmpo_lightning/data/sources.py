"""Rows of a benchmark from local files or the hub, with errors that name file, line and remedy. Imports no torch."""

import csv
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dmpo_lightning.tasks.base import check_choice, check_sizes
from dmpo_lightning.tasks.json_lines import NOT_UTF8, numbered_lines

OnBadRow = Literal["error", "skip"]
Row = Mapping[str, Any]
HELD_OUT = 256
"""Examples held out of training for a split that the source lacks, where `sizes` says nothing."""
SUFFIXES = (".jsonl", ".csv", ".parquet")

_UNDECODED = re.compile("[\udc80-\udcff]")
"""Bytes that are not UTF-8, as ``surrogateescape`` reads them."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """Examples, and how many rows were left out."""

    examples: list[dict[str, Any]]
    skipped: int = 0
    """Bad rows."""
    filtered: int = 0
    """Good rows that were not asked for."""


def load_file(
    path: Path, parse: Callable[[Row], Row], *, columns: Sequence[str] = (), on_bad_row: OnBadRow = "error"
) -> Loaded:
    """Every row of a JSONL, CSV or parquet file through ``parse``, in the file's order.

    Args:
        path: of the file. Its suffix says the format.
        parse: makes an example of a row. Its ValueError, LookupError, TypeError or OverflowError marks the row as bad.
        columns: that every row must have.
        on_bad_row: ``error`` stops at the first bad row, ``skip`` leaves bad rows out and counts them.

    Raises:
        ValueError: no such file, another format, an empty file, a bad row, or none but bad rows.
    """
    check_choice("on_bad_row", on_bad_row, get_args(OnBadRow))
    if not path.is_file():
        raise ValueError(f"No data file {path}; give `path` a file or folder that exists, or leave it out for the hub.")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}.")
    return _parse_all(str(path), _numbered_rows(path), parse, columns, on_bad_row)


def load_hub(
    identifier: str,
    parse: Callable[[Row], Row],
    *,
    split: str,
    name: str | None = None,
    revision: str | None = None,
    columns: Sequence[str] = (),
    on_bad_row: OnBadRow = "error",
) -> Loaded:
    """A split of a dataset on the hub, cached by ``datasets``. Arguments and errors are those of `load_file`."""
    check_choice("on_bad_row", on_bad_row, get_args(OnBadRow))
    import datasets

    try:
        rows = datasets.load_dataset(identifier, name, split=split, revision=revision)
    # `datasets` raises whatever its network stack does.
    except Exception as error:
        raise ValueError(
            f"Could not load {split} of {identifier} (revision {revision or 'latest'}) from the hub: "
            f"{type(error).__name__}: {error}. Check the connection, or download the files and set `path`."
        ) from error
    return _parse_all(f"{identifier}[{split}]", enumerate(rows, 1), parse, columns, on_bad_row)


def find_file(folder: Path, split: str) -> Path | None:
    """``train.jsonl``, ``train.csv`` or ``train.parquet`` of a folder, if it has one."""
    return next((path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()), None)


def _parse_all(
    source: str,
    rows: Iterable[tuple[int, "Row | str"]],
    parse: Callable[[Row], Row],
    columns: Sequence[str],
    on_bad_row: OnBadRow,
) -> Loaded:
    examples, skipped = [], 0
    for number, row in rows:
        try:
            # Readers cannot raise for a row and go on, so they hand on what is wrong with it as text.
            if isinstance(row, str):
                raise ValueError(row)
            missing = [column for column in columns if row.get(column) is None]
            if missing:
                raise ValueError(f"column {missing[0]!r} is missing, there are {sorted(map(str, row))}")
            examples.append(dict(parse(row)))
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            if on_bad_row == "error":
                cause = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
                raise ValueError(f"{source}, row {number}: {cause}. Mend the row, or set on_bad_row: skip.") from error
            skipped += 1
    if skipped:
        logger.warning("Skipped %d bad rows of %s; %d are left.", skipped, source, len(examples))
    if not examples:
        raise ValueError(f"{source} holds no usable row ({skipped} bad ones); give a file with data.")
    return Loaded(examples, skipped)


def _numbered_rows(path: Path) -> Iterator[tuple[int, "Row | str"]]:
    """Rows with their numbers, of lines or in a parquet file of rows. A text in place of a row says what is wrong."""
    if path.suffix == ".parquet":
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]

        try:
            table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} cannot be read as parquet ({error}); write it again, or as .jsonl.") from error
        yield from enumerate(table.to_pylist(), 1)
    elif path.suffix == ".csv":
        # A byte order mark, as spreadsheets write it, would become part of the first column's name. Line ends are the
        # reader's business, because quoted fields may hold some.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _csv_rows(csv.DictReader(file))
    else:
        for number, value, problem in numbered_lines(path):
            if isinstance(value, dict):
                yield number, value
            else:
                yield number, problem or f"not a JSON object but {type(value).__name__}"


def _csv_rows(reader: "csv.DictReader[str]") -> Iterator[tuple[int, "Row | str"]]:
    while True:
        try:
            row: Row | str = next(reader)
        except StopIteration:
            return
        # A field above the reader's limit, for one. The reader goes on behind it.
        except csv.Error as error:
            row = f"not CSV ({error})"
        yield reader.line_num, NOT_UTF8 if _UNDECODED.search(json.dumps(row, ensure_ascii=False)) else row


class HeldOutSplits(Mapping[str, list[dict[str, Any]]]):
    """Train, validation and test without a common key.

    Splits are loaded when first asked for. ``report`` counts what was left out of each.

    Args:
        load: the examples of a split, or None where the source has no such split.
        key: of an example. No key of a held-out split appears in training.
        sizes: most examples of a split, drawn by the seed and kept in their order. For a split that the source does not
            have, it is the number that is held out of training.
        seed: of those draws.
        hold_out_test: whether a missing test split is held out of training too.

    Raises:
        ValueError: a split that does not exist and is not held out, or nothing left to train on (when asked for).
    """

    def __init__(
        self,
        load: Callable[[str], Loaded | None],
        *,
        key: Callable[[Row], str],
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
        hold_out_test: bool = False,
    ) -> None:
        self.load, self.key, self.seed, self.hold_out_test = load, key, seed, hold_out_test
        self.sizes = check_sizes(sizes)
        self.report: dict[str, int] = {}
        self._sources: dict[str, list[dict[str, Any]] | None] = {}
        self._training: dict[str, list[dict[str, Any]]] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(("train", "validation", "test"))

    def __len__(self) -> int:
        return 3

    def __getitem__(self, split: str) -> list[dict[str, Any]]:
        if split not in tuple(self):
            # What `in` and `get` of a Mapping expect.
            raise KeyError(split)
        # Splits of the source are never mixed: only what it lacks is held out of training.
        own = None if split == "train" else self._source(split)
        if own is None and split == "test" and not self.hold_out_test:
            raise ValueError(
                "The data has no test split; give `path` a folder with a file test.jsonl, .csv or .parquet."
            )
        return self._subset(self._made_of_training()[split] if own is None else own, split)

    def _source(self, split: str) -> list[dict[str, Any]] | None:
        if split not in self._sources:
            loaded = self.load(split)
            self._sources[split] = None if loaded is None else loaded.examples
            self._count(f"{split}/bad_rows", loaded.skipped if loaded else 0)
            self._count(f"{split}/filtered", loaded.filtered if loaded else 0)
        return self._sources[split]

    def _made_of_training(self) -> dict[str, list[dict[str, Any]]]:
        """What is left for training, and the splits held out of it."""
        if self._training is not None:
            return self._training
        pool = self._source("train")
        if pool is None:
            raise ValueError("The data has no train split; give `path` a folder with train.jsonl, .csv or .parquet.")
        different = list({json.dumps(example, sort_keys=True): example for example in pool}.values())
        self._count("train/duplicates", len(pool) - len(different))
        held_out = {self.key(example) for split in ("validation", "test") for example in self._source(split) or ()}
        free = [example for example in different if self.key(example) not in held_out]
        self._count("train/overlap_with_held_out", len(different) - len(free))
        made: dict[str, list[dict[str, Any]]] = {}
        for split in ("validation", "test"):
            if self._source(split) is None and (split == "validation" or self.hold_out_test):
                made[split], free = self._hold_out(free, split)
        if not free:
            raise ValueError("Nothing is left to train on once validation and test are held out; lower `sizes`.")
        self._training = {**made, "train": free}
        return self._training

    def _hold_out(self, pool: list[dict[str, Any]], split: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        # Whole keys are held out, so that no problem of the held-out split is also in training in another form.
        keys = list(dict.fromkeys(map(self.key, pool)))
        random.Random(f"{self.seed}-{split}").shuffle(keys)
        by_key = Counter(map(self.key, pool))
        taken: set[str] = set()
        count = 0
        for key in keys:
            if count >= self.sizes.get(split, HELD_OUT):
                break
            taken.add(key)
            count += by_key[key]
        inside = [example for example in pool if self.key(example) in taken]
        return inside, [example for example in pool if self.key(example) not in taken]

    def _subset(self, examples: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
        size = self.sizes.get(split, len(examples))
        if size >= len(examples):
            return examples
        # Sorted, so that a subset keeps the order of the source.
        rows = sorted(random.Random(f"{self.seed}-{split}-subset").sample(range(len(examples)), size))
        return [examples[row] for row in rows]

    def _count(self, name: str, count: int) -> None:
        self.report[name] = count
        if count:
            logger.warning("%s: %d examples left out.", name, count)


def local_loader(
    path: Path, parse: Callable[[Row], Row], *, columns: Sequence[str], on_bad_row: OnBadRow
) -> Callable[[str], Loaded | None]:
    """Loads the splits of a folder of ``train``, ``validation`` and ``test`` files, or of one file.

    One file is the split that its name says, else train.

    Raises:
        ValueError: neither a file nor a folder with such files.
    """
    check_choice("on_bad_row", on_bad_row, get_args(OnBadRow))
    if path.is_dir():
        files = {split: find_file(path, split) for split in ("train", "validation", "test")}
        if not any(files.values()):
            raise ValueError(f"{path} holds none of train, validation, test as {', '.join(SUFFIXES)}; see `path`.")
    elif path.is_file():
        files = {path.stem if path.stem in ("validation", "test") else "train": path}
    else:
        raise ValueError(f"No file or folder {path}; give `path` one that exists, or leave it out.")

    def load(split: str) -> Loaded | None:
        file = files.get(split)
        return None if file is None else load_file(file, parse, columns=columns, on_bad_row=on_bad_row)

    return load
