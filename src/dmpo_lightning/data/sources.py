"""Rows of a benchmark from local files or the hub, with errors that name file, line and remedy. Imports no torch."""

import csv
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

from dmpo_lightning.tasks.base import check_choice, check_sizes
from dmpo_lightning.tasks.json_lines import numbered_lines

OnBadRow = Literal["error", "skip"]
Row = Mapping[str, Any]
Examples = list[dict[str, Any]]
SplitLoader = Callable[[str], Examples | None]
"""The examples of a split, or None where a source has no such split."""
HELD_OUT = 256
"""Examples held out of training for a split that the source lacks, where `sizes` says nothing."""
SUFFIXES = (".jsonl", ".csv", ".parquet")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parser:
    """Makes examples of rows.

    Args:
        parse: makes an example of a row. Its ValueError, LookupError, TypeError or OverflowError marks the row as bad.
        columns: that every row must have.
        on_bad_row: ``error`` stops at the first bad row, ``skip`` leaves bad rows out and counts them in a warning.

    Raises:
        ValueError: another ``on_bad_row``.
    """

    parse: Callable[[Row], Row]
    columns: Sequence[str] = ()
    on_bad_row: OnBadRow = "error"

    def __post_init__(self) -> None:
        check_choice("on_bad_row", self.on_bad_row, get_args(OnBadRow))

    def examples(self, source: str, rows: Iterable[tuple[int, Row]]) -> Examples:
        """The examples of numbered rows, in their order.

        Raises:
            ValueError: a bad row, named by ``source`` and number, or no row that could be used.
        """
        examples, skipped = [], 0
        for number, row in rows:
            try:
                missing = [column for column in self.columns if row.get(column) is None]
                if missing:
                    raise ValueError(f"column {missing[0]!r} is missing, there are {sorted(map(str, row))}")
                examples.append(dict(self.parse(row)))
            except (ValueError, LookupError, TypeError, OverflowError) as error:
                if self.on_bad_row == "error":
                    cause = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
                    remedy = "Mend or remove the row; datamodules leave it out with on_bad_row: skip."
                    raise ValueError(f"{source}, row {number}: {cause}. {remedy}") from error
                skipped += 1
        if skipped:
            logger.warning("Skipped %d bad rows of %s; %d are left.", skipped, source, len(examples))
        if not examples:
            raise ValueError(f"{source} holds no usable row ({skipped} bad ones); give a file with data.")
        return examples


def load_file(path: Path, parser: Parser) -> Examples:
    """What `Parser.examples` makes of a JSONL, CSV or parquet file.

    Raises:
        ValueError: no such file, another format, a file that cannot be read, and as the parser does.
    """
    if not path.is_file():
        raise ValueError(f"No data file {path}; give `path` a file or folder that exists, or leave it out for the hub.")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}.")
    return parser.examples(str(path), _numbered_rows(path))


def local_loader(path: Path, parser: Parser) -> SplitLoader:
    """Loads the splits of a folder of ``train``, ``validation`` and ``test`` files, or of one file.

    One file is the split that its name says, else train.

    Raises:
        ValueError: neither a file nor a folder with such files.
    """
    if path.is_dir():
        named = [path / f"{split}{suffix}" for suffix in SUFFIXES for split in ("train", "validation", "test")]
        # Backwards, so that the first suffix wins where a split has several files.
        files = {file.stem: file for file in reversed(named) if file.is_file()}
        if not files:
            raise ValueError(f"{path} holds none of train, validation, test as {', '.join(SUFFIXES)}; see `path`.")
    elif path.is_file():
        files = {path.stem if path.stem in ("validation", "test") else "train": path}
    else:
        raise ValueError(f"No file or folder {path}; give `path` one that exists, or leave it out.")
    return lambda split: load_file(files[split], parser) if split in files else None


def hub_loader(
    splits: Mapping[str, tuple[str, str | None, str]], parser: Parser, *, revision: str | None
) -> SplitLoader:
    """Loads the splits of datasets on the hub, cached by ``datasets``.

    Args:
        splits: dataset, configuration and split on the hub, for each of our splits that it has.
        parser: of their rows.
        revision: of each dataset.

    Raises:
        ValueError: the hub cannot be reached, or as the parser does (when a split is loaded).
    """

    def load(split: str) -> Examples | None:
        if split not in splits:
            return None
        identifier, name, theirs = splits[split]
        import datasets

        try:
            rows = datasets.load_dataset(identifier, name, split=theirs, revision=revision)
        # `datasets` raises whatever its network stack does.
        except Exception as error:
            raise ValueError(
                f"Could not load {theirs} of {identifier} (revision {revision or 'latest'}) from the hub: "
                f"{type(error).__name__}: {error}. Check the connection, or download the files and set `path`."
            ) from error
        return parser.examples(f"{identifier}[{theirs}]", enumerate(rows, 1))

    return load


def _numbered_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows with their numbers, of lines or in a parquet file of rows."""
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
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            try:
                yield from ((reader.line_num, row) for row in reader)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{path} cannot be read as CSV ({error}); mend it, or write it as .jsonl.") from error
    else:
        for number, row in numbered_lines(path):
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object but {type(row).__name__}.")
            yield number, row


class HeldOutSplits(Mapping[str, Examples]):
    """Train, validation and test without a common key. What is left out of training is counted in a warning.

    Args:
        load: the examples of a split, each of which is loaded when it is first asked for.
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
        load: SplitLoader,
        *,
        key: Callable[[Row], str],
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
        hold_out_test: bool = False,
    ) -> None:
        self.load, self.key, self.sizes, self.seed = cache(load), key, check_sizes(sizes), seed
        self.held_out = ("validation", "test") if hold_out_test else ("validation",)

    def __iter__(self) -> Iterator[str]:
        return iter(("train", "validation", "test"))

    def __len__(self) -> int:
        return 3

    def __getitem__(self, split: str) -> Examples:
        if split not in tuple(self):
            # What `in` and `get` of a Mapping expect.
            raise KeyError(split)
        # Splits of the source are never mixed: only what it lacks is held out of training.
        own = None if split == "train" else self.load(split)
        if own is None and split == "test" and split not in self.held_out:
            raise ValueError(
                "The data has no test split; give `path` a folder with a file test.jsonl, .csv or .parquet."
            )
        return self._subset(self._made_of_training[split] if own is None else own, split)

    @cached_property
    def _made_of_training(self) -> dict[str, Examples]:
        """What is left for training, and the splits held out of it."""
        pool = self.load("train")
        if pool is None:
            raise ValueError("The data has no train split; give `path` a folder with train.jsonl, .csv or .parquet.")
        different = list({json.dumps(example, sort_keys=True): example for example in pool}.values())
        held_out = {self.key(example) for split in ("validation", "test") for example in self.load(split) or ()}
        free = [example for example in different if self.key(example) not in held_out]
        for count, fault in ((len(pool) - len(different), "duplicates"), (len(different) - len(free), "held out too")):
            if count:
                logger.warning("%d examples of train are %s, and left out.", count, fault)
        made = {}
        for split in self.held_out:
            if self.load(split) is None:
                made[split], free = self._hold_out(free, split)
        if not free:
            raise ValueError("Nothing is left to train on once validation and test are held out; lower `sizes`.")
        return {**made, "train": free}

    def _hold_out(self, pool: Examples, split: str) -> tuple[Examples, Examples]:
        # Whole keys are held out, so that no problem of the held-out split is also in training in another form.
        by_key: dict[str, Examples] = {}
        for example in pool:
            by_key.setdefault(self.key(example), []).append(example)
        keys = list(by_key)
        random.Random(f"{self.seed}-{split}").shuffle(keys)
        # The number of examples before each key. The last number is the total, behind the last key.
        before = accumulate((len(by_key[key]) for key in keys), initial=0)
        taken = {key for key, count in zip(keys, before, strict=False) if count < self.sizes.get(split, HELD_OUT)}
        inside = [example for example in pool if self.key(example) in taken]
        return inside, [example for example in pool if self.key(example) not in taken]

    def _subset(self, examples: Examples, split: str) -> Examples:
        size = self.sizes.get(split, len(examples))
        if size >= len(examples):
            return examples
        # Sorted, so that a subset keeps the order of the source.
        rows = sorted(random.Random(f"{self.seed}-{split}-subset").sample(range(len(examples)), size))
        return [examples[row] for row in rows]
