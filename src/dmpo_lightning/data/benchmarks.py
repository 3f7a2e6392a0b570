"""The benchmarks as LightningDataModules, on local files or the hub."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from dmpo_lightning.data.sources import (
    Examples,
    HeldOutSplits,
    OnBadRow,
    Parser,
    SplitLoader,
    hub_loader,
    local_loader,
)
from dmpo_lightning.data.task_module import TaskDataModule
from dmpo_lightning.tasks.base import PromptStyle, Split, Variant, check_choice, check_sizes
from dmpo_lightning.tasks.benchmark import Benchmark
from dmpo_lightning.tasks.countdown import Countdown
from dmpo_lightning.tasks.countdown_puzzles import generate, puzzle_key
from dmpo_lightning.tasks.gsm8k import GSM8K
from dmpo_lightning.tasks.math500 import Math500
from dmpo_lightning.tasks.sudoku import Sudoku

logger = logging.getLogger(__name__)


class BenchmarkDataModule(TaskDataModule):
    """A `Benchmark` on local files or the hub. It is the base of those below and not used by itself.

    A validation split that is missing is held out of train: 256 examples unless ``sizes`` says otherwise. Examples of
    train that come in a held-out split are dropped and counted in a warning.

    Args:
        path: a folder of ``train``, ``validation`` and ``test`` files (.jsonl, .csv or .parquet), or one file, which is
            the split that its name says, else train. None loads from the hub.
        revision: of the dataset on the hub.
        sizes: most examples of a split, drawn by the seed.
        seed: of what is held out and of those draws.
        on_bad_row: ``error``, or ``skip`` and count.
        rewards: which score components the reward has, ``published`` or ``verified``.
        check: which variant of the check gives the accuracy. None, for Sudoku alone, has the score say it.
        prompt_style: ``train`` or ``eval``, as published. Training and evaluation have the same.
        system_prompt: a system turn before the user's. None sends none, as published.
        instruction: replaces the style's text before the task text. An empty one leaves it out.
        prompt_template: the whole of the user's turn instead, see `Benchmark`.
        few_shot: solved examples shown first, each ``{"example": ..., "completion": ...}``.
        prefill: what the assistant's turn starts with. None is the style's own.
        options: of `TaskDataModule`.

    Raises:
        ValueError: as `TaskDataModule`, `Benchmark` and `load_file` do.
    """

    benchmark: ClassVar[type[Benchmark]]
    hub: ClassVar[Mapping[str, tuple[str, str | None, str]]] = {}
    """Dataset, configuration and split on the hub, for each of our splits that it has."""
    hold_out_test: ClassVar[bool] = False

    def __init__(
        self,
        *,
        path: str | None = None,
        revision: str | None = None,
        sizes: dict[str, int] | None = None,
        seed: int = 0,
        on_bad_row: OnBadRow = "error",
        rewards: Variant = "verified",
        check: Variant | None = "verified",
        prompt_style: PromptStyle = "train",
        system_prompt: str | None = None,
        instruction: str | None = None,
        prompt_template: str | None = None,
        few_shot: list[dict[str, Any]] | None = None,
        prefill: str | None = None,
        **options: Any,
    ) -> None:
        # Set before `_source` and `_task` are called, which read them, in subclasses too.
        self.sizes, self.seed = check_sizes(sizes), seed
        self.splits = HeldOutSplits(
            self._source(
                None if path is None else Path(path),
                revision,
                Parser(self.benchmark.from_row, self.benchmark.columns, on_bad_row),
            ),
            key=self.key,
            sizes=sizes,
            seed=seed,
            hold_out_test=self.hold_out_test,
        )
        task = self._task(
            rewards=rewards,
            check=check,
            prompt_style=prompt_style,
            system_prompt=system_prompt,
            instruction=instruction,
            prompt_template=prompt_template,
            few_shot=few_shot or (),
            prefill=prefill,
        )
        super().__init__(task=task, **options)

    def key(self, example: Mapping[str, Any]) -> str:
        """What makes two examples the same problem."""
        # White space makes no other problem.
        return " ".join(str(example.get("question", example.get("problem"))).split())

    def _task(self, **options: Any) -> Benchmark:
        return self.benchmark(self.splits, **options)

    def _source(self, path: Path | None, revision: str | None, parser: Parser) -> SplitLoader:
        if path is None:
            return hub_loader(self.hub, parser, revision=revision)
        return local_loader(path, parser)


class GSM8KDataModule(BenchmarkDataModule):
    """`GSM8K` from the hub (openai/gsm8k) or from files of ``question`` and ``answer``.

    Example:
        >>> from dmpo_lightning import GSM8KDataModule
        >>> data = GSM8KDataModule(rewards="published", prompts_per_buffer=16, max_prompt_length=200)
    """

    benchmark = GSM8K
    hub = {"train": ("openai/gsm8k", "main", "train"), "test": ("openai/gsm8k", "main", "test")}


class Math500DataModule(BenchmarkDataModule):
    """`Math500`: trains on the train split of MATH and tests on MATH-500.

    Files hold ``problem`` and ``answer`` or ``solution``. A ``revision`` applies to both datasets.

    Args:
        algebra: whether the check ``verified`` may compare by algebra, see `Math500`.
        options: of `BenchmarkDataModule`.

    Example:
        >>> from dmpo_lightning import Math500DataModule
        >>> data = Math500DataModule(prompts_per_buffer=16, sizes={"validation": 256})
    """

    benchmark = Math500
    hub = {
        "train": ("DigitalLearningGmbH/MATH-lighteval", None, "train"),
        "test": ("HuggingFaceH4/MATH-500", None, "test"),
    }

    def __init__(self, *, algebra: bool = False, **options: Any) -> None:
        # Before the constructor of the base class, which calls `_task`.
        self.algebra = algebra
        super().__init__(**options)

    def _task(self, **options: Any) -> Benchmark:
        return super()._task(**options, algebra=self.algebra)


class CountdownDataModule(BenchmarkDataModule):
    """`Countdown` from the hub (Jiayi-Pan/Countdown-Tasks-3to4), from files, or generated.

    Args:
        source: ``data`` takes every split from ``path`` or the hub. ``generated`` makes train, validation and, unless
            ``path`` has it, test. Generated puzzles are solvable and seeded, and none of a held-out split is in train.
            There are 4096, 256 and 256 unless ``sizes`` says otherwise.
        count: least and most numbers of a puzzle. Of ``data``, rows with more or fewer are left out and counted in a
            warning. The published puzzles have three.
        largest: number of a generated puzzle.
        largest_target: of a generated puzzle. None is the largest number.
        brackets: whether a generated puzzle may need brackets. Without, no number on the way is negative or a fraction
            either.
        options: of `BenchmarkDataModule`. ``seed`` is that of the generated puzzles too.

    Example:
        >>> from dmpo_lightning import CountdownDataModule
        >>> options = {"tokenizer": "countdown_tiny", "prompts_per_buffer": 8, "sizes": {"train": 64, "validation": 8}}
        >>> data = CountdownDataModule(source="generated", **options)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader())).examples[0]
        {'numbers': [84, 22, 22], 'target': 40}
    """

    benchmark = Countdown
    hub = {"train": ("Jiayi-Pan/Countdown-Tasks-3to4", None, "train")}
    # The hub has a train split alone.
    hold_out_test = True

    def __init__(
        self,
        *,
        source: Literal["data", "generated"] = "data",
        count: tuple[int, int] = (3, 3),
        largest: int = 100,
        largest_target: int | None = None,
        brackets: bool = True,
        **options: Any,
    ) -> None:
        check_choice("source", source, ("data", "generated"))
        if not 1 <= count[0] <= count[1]:
            raise ValueError(f"`count` must be two counts with 1 <= least <= most, got {count}.")
        # Before the constructor of the base class, which calls `_source`.
        self.source, self.count, self.largest = source, count, largest
        self.largest_target, self.brackets = largest_target, brackets
        super().__init__(**options)

    def key(self, example: Mapping[str, Any]) -> str:
        return puzzle_key(example)

    def _source(self, path: Path | None, revision: str | None, parser: Parser) -> SplitLoader:
        given = super()._source(path, revision, parser)
        if self.source == "data":
            return lambda split: self._of_count(split, given(split))

        # Once, because training asks for the puzzles of the other splits too, to leave them out.
        @cache
        def load(split: str) -> Examples:
            own = given(split) if split == "test" and path is not None else None
            return own or self._generated(split, load)

        return load

    def _of_count(self, split: str, examples: Examples | None) -> Examples | None:
        """Without the puzzles that have more or fewer numbers than ``count``."""
        if examples is None:
            return None
        least, most = self.count
        kept = [example for example in examples if least <= len(example["numbers"]) <= most]
        if not kept:
            raise ValueError(f"None of the {len(examples)} {split} puzzles has {least} to {most} numbers; set `count`.")
        if len(kept) < len(examples):
            logger.warning("Left out %d %s puzzles of another `count`.", len(examples) - len(kept), split)
        return kept

    def _generated(self, split: str, load: SplitLoader) -> Examples:
        # Each split leaves out what those held out before it have. The order is what ends the recursion.
        held_out = {"train": ("validation", "test"), "validation": ("test",), "test": ()}[split]
        sizes = {"train": 4096, "validation": 256, "test": 256} | self.sizes
        puzzles = generate(
            sizes[split],
            count=self.count,
            largest=self.largest,
            largest_target=self.largest_target,
            brackets=self.brackets,
            # Splits of one seed would otherwise be the same puzzles.
            seed=f"{self.seed}-{split}",
            excluded={puzzle_key(example) for other in held_out for example in load(other) or ()},
        )
        return [dict(puzzle) for puzzle in puzzles]


class SudokuDataModule(BenchmarkDataModule):
    """4x4 `Sudoku`, generated and split by solution, or from files of ``Puzzle`` and ``Solution``.

    No grid of a held-out split is the solution of a training puzzle. Such puzzles of a file are dropped and counted in
    a warning.

    Args:
        blanks: least and most blank cells of a generated puzzle.
        options: of `BenchmarkDataModule`. Without a ``path`` puzzles are generated, ``sizes`` of each split: 4096, 512
            and 1024 unless it says otherwise.

    Example:
        >>> from dmpo_lightning import SudokuDataModule
        >>> data = SudokuDataModule(blanks=(4, 6), sizes={"train": 100}, tokenizer="sudoku_tiny", prompts_per_buffer=8)
    """

    benchmark = Sudoku
    hold_out_test = True

    def __init__(self, *, blanks: tuple[int, int] = (8, 12), **options: Any) -> None:
        self.blanks = blanks
        super().__init__(**options)

    def key(self, example: Mapping[str, Any]) -> str:
        return str(example["solution"])

    def _source(self, path: Path | None, revision: str | None, parser: Parser) -> SplitLoader:
        if path is not None:
            return super()._source(path, revision, parser)
        # This task only generates. The module's own gets the puzzles as data, and all other options.
        puzzles = Sudoku(blanks=self.blanks, sizes=self.sizes, seed=self.seed)
        return lambda split: [dict(example) for example in puzzles.examples(cast("Split", split))]
