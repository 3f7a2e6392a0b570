"""Tasks as LightningDataModules of prompts, with the reward that goes with them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning.pytorch import LightningDataModule

from dmpo_lightning.data.prompts import LongPrompts, PromptLoader
from dmpo_lightning.data.sources import HeldOutSplits, Loaded, OnBadRow, check_sizes, load_hub, local_loader
from dmpo_lightning.models.loading import load_tokenizer
from dmpo_lightning.rewards import Reward
from dmpo_lightning.tasks.base import PromptStyle, Split, Task, Variant
from dmpo_lightning.tasks.benchmark import Benchmark, check_choice
from dmpo_lightning.tasks.countdown import Countdown, generate, puzzle_key
from dmpo_lightning.tasks.gsm8k import GSM8K
from dmpo_lightning.tasks.math500 import Math500
from dmpo_lightning.tasks.sudoku import Sudoku

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TaskDataModule(LightningDataModule):
    """Prompts of any `Task`, and its reward.

    Args:
        task: examples, prompts and scores.
        tokenizer: a tokenizer, or the id or folder of one; the command line fills in that of the model.
        prompts_per_buffer: prompts of one rollout buffer and rank.
        evaluation_batch_size: prompts per batch in validation, test and prediction.
        reward_weights: of the task's score components in the reward; None takes each with weight 1.
        max_prompt_length: in tokens; None leaves it to the model's own limit.
        on_long_prompt: ``error`` or ``drop``, see `PromptLoader`.

    Raises:
        ValueError: an empty split or a prompt that is too long, when its loader is built.
    """

    def __init__(
        self,
        task: Task,
        *,
        tokenizer: "str | PreTrainedTokenizerBase",
        prompts_per_buffer: int,
        evaluation_batch_size: int = 64,
        reward_weights: Mapping[str, float] | None = None,
        max_prompt_length: int | None = None,
        on_long_prompt: LongPrompts = "error",
    ) -> None:
        super().__init__()
        self.task, self.tokenizer = task, load_tokenizer(tokenizer)
        self.prompts_per_buffer, self.evaluation_batch_size = prompts_per_buffer, evaluation_batch_size
        self.max_prompt_length, self.on_long_prompt = max_prompt_length, on_long_prompt
        self.reward = Reward.of_task(task, reward_weights)
        self._loaders: dict[str, PromptLoader] = {}

    def train_dataloader(self) -> PromptLoader:
        return self._loader("train", self.prompts_per_buffer)

    def val_dataloader(self) -> PromptLoader:
        return self._loader("validation", self.evaluation_batch_size)

    def test_dataloader(self) -> PromptLoader:
        return self._loader("test", self.evaluation_batch_size)

    def predict_dataloader(self) -> PromptLoader:
        return self._loader("test", self.evaluation_batch_size)

    def _loader(self, split: Split, batch_size: int) -> PromptLoader:
        if split not in self._loaders:
            self._loaders[split] = PromptLoader(
                self.task.examples(split),
                self.tokenizer,
                batch_size=batch_size,
                prompt=self.task.prompt,
                shuffle=split == "train",
                max_prompt_length=self.max_prompt_length,
                on_long_prompt=self.on_long_prompt,
            )
        return self._loaders[split]


class _BenchmarkDataModule(TaskDataModule):
    """A `Benchmark` on local files or the hub; the arguments of its subclasses are explained here.

    Args:
        tokenizer, prompts_per_buffer, evaluation_batch_size, reward_weights, max_prompt_length, on_long_prompt: as in
            `TaskDataModule`; reward_weights None takes the components of ``rewards`` with weight 1.
        path: a folder of ``train``, ``validation`` and ``test`` files (.jsonl, .csv or .parquet), or one file, which is
            the split that its name says, else train; None loads from the hub. A validation split that is missing is
            held out of train (256 examples unless ``sizes`` says otherwise). Examples of train that come in a held-out
            split are dropped and counted in ``splits.report``.
        revision: of the dataset on the hub.
        sizes: most examples of a split, drawn by the seed.
        seed: of what is held out and of those draws.
        rewards, verifier, prompt_style, system_prompt, few_shot: as in `Benchmark`.
        on_bad_row: ``error``, or ``skip`` and count.

    Raises:
        ValueError: as `TaskDataModule`, `Benchmark` and `load_file` do.
    """

    benchmark: ClassVar[type[Benchmark]]
    hub: ClassVar[Mapping[str, tuple[str, str | None, str]]]
    """Dataset, configuration and split on the hub, for each of our splits that it has."""
    hold_out_test: ClassVar[bool] = False

    def __init__(
        self,
        *,
        tokenizer: "str | PreTrainedTokenizerBase",
        prompts_per_buffer: int,
        evaluation_batch_size: int = 64,
        path: str | None = None,
        revision: str | None = None,
        sizes: dict[str, int] | None = None,
        seed: int = 0,
        rewards: Variant = "verified",
        verifier: Variant = "verified",
        reward_weights: dict[str, float] | None = None,
        prompt_style: PromptStyle = "train",
        system_prompt: str | None = None,
        few_shot: list[dict[str, Any]] | None = None,
        max_prompt_length: int | None = None,
        on_long_prompt: LongPrompts = "error",
        on_bad_row: OnBadRow = "error",
    ) -> None:
        self.splits = HeldOutSplits(
            self._loader_of_splits(path, revision, on_bad_row),
            key=self.key,
            sizes=sizes,
            seed=seed,
            hold_out_test=self.hold_out_test,
        )
        task = self.benchmark(
            self.splits,
            rewards=rewards,
            verifier=verifier,
            prompt_style=prompt_style,
            system_prompt=system_prompt,
            few_shot=few_shot or (),
        )
        super().__init__(
            task,
            tokenizer=tokenizer,
            prompts_per_buffer=prompts_per_buffer,
            evaluation_batch_size=evaluation_batch_size,
            reward_weights=reward_weights,
            max_prompt_length=max_prompt_length,
            on_long_prompt=on_long_prompt,
        )

    @staticmethod
    def key(example: Mapping[str, Any]) -> str:
        """What makes two examples the same problem."""
        return " ".join(str(example.get("question", example.get("problem"))).split())

    def _loader_of_splits(
        self, path: str | None, revision: str | None, on_bad_row: OnBadRow
    ) -> Callable[[str], Loaded | None]:
        parse, columns = self.benchmark.from_row, self.benchmark.columns
        if path is not None:
            return local_loader(Path(path), parse, columns=columns, on_bad_row=on_bad_row)

        def load(split: str) -> Loaded | None:
            if split not in self.hub:
                return None
            identifier, name, theirs = self.hub[split]
            return load_hub(
                identifier,
                parse,
                split=theirs,
                name=name,
                revision=revision,
                columns=columns,
                on_bad_row=on_bad_row,
            )

        return load


class GSM8KDataModule(_BenchmarkDataModule):
    """`GSM8K` from the hub (openai/gsm8k) or from files of ``question`` and ``answer``; arguments as above."""

    benchmark = GSM8K
    hub = {"train": ("openai/gsm8k", "main", "train"), "test": ("openai/gsm8k", "main", "test")}


class Math500DataModule(_BenchmarkDataModule):
    """`Math500`: trains on the train split of MATH, tests on MATH-500; files of ``problem`` and ``answer`` or
    ``solution``. A ``revision`` applies to both datasets.
    """

    benchmark = Math500
    hub = {
        "train": ("DigitalLearningGmbH/MATH-lighteval", None, "train"),
        "test": ("HuggingFaceH4/MATH-500", None, "test"),
    }


class CountdownDataModule(_BenchmarkDataModule):
    """`Countdown` from the hub (Jiayi-Pan/Countdown-Tasks-3to4), from files, or generated.

    Args:
        source: ``data`` takes every split from ``path`` or the hub; ``generated`` makes train, validation and, unless
            ``path`` has it, test: solvable, seeded, none of them in a held-out split (4096, 256 and 256 puzzles unless
            ``sizes`` says otherwise).
        count: least and most numbers of a generated puzzle.
        largest: number and target of a generated puzzle.
        seed: of the generated puzzles too.
    """

    benchmark = Countdown
    hub = {"train": ("Jiayi-Pan/Countdown-Tasks-3to4", None, "train")}
    hold_out_test = True

    def __init__(
        self,
        *,
        tokenizer: "str | PreTrainedTokenizerBase",
        prompts_per_buffer: int,
        evaluation_batch_size: int = 64,
        source: Literal["generated", "data"] = "generated",
        count: tuple[int, int] = (3, 3),
        largest: int = 100,
        path: str | None = None,
        revision: str | None = None,
        sizes: dict[str, int] | None = None,
        seed: int = 0,
        rewards: Variant = "verified",
        verifier: Variant = "verified",
        reward_weights: dict[str, float] | None = None,
        prompt_style: PromptStyle = "train",
        system_prompt: str | None = None,
        few_shot: list[dict[str, Any]] | None = None,
        max_prompt_length: int | None = None,
        on_long_prompt: LongPrompts = "error",
        on_bad_row: OnBadRow = "error",
    ) -> None:
        check_choice("source", source, ("generated", "data"))
        if not 1 <= count[0] <= count[1]:
            raise ValueError(f"`count` must be two counts with 1 <= least <= most, got {count}.")
        self.source, self.count, self.largest, self.seed = source, count, largest, seed
        self.generated_sizes = {"train": 4096, "validation": 256, "test": 256} | check_sizes(sizes)
        super().__init__(
            tokenizer=tokenizer,
            prompts_per_buffer=prompts_per_buffer,
            evaluation_batch_size=evaluation_batch_size,
            path=path,
            revision=revision,
            sizes=sizes,
            seed=seed,
            rewards=rewards,
            verifier=verifier,
            reward_weights=reward_weights,
            prompt_style=prompt_style,
            system_prompt=system_prompt,
            few_shot=few_shot,
            max_prompt_length=max_prompt_length,
            on_long_prompt=on_long_prompt,
            on_bad_row=on_bad_row,
        )

    @staticmethod
    def key(example: Mapping[str, Any]) -> str:
        return puzzle_key(example)

    def _loader_of_splits(
        self, path: str | None, revision: str | None, on_bad_row: OnBadRow
    ) -> Callable[[str], Loaded | None]:
        if self.source == "data":
            return super()._loader_of_splits(path, revision, on_bad_row)
        given = super()._loader_of_splits(path, revision, on_bad_row) if path is not None else lambda split: None
        made: dict[str, Loaded] = {}

        def load(split: str) -> Loaded:
            if split not in made:
                found = given(split) if split == "test" else None
                made[split] = found or self._generated(split, load)
            return made[split]

        return load

    def _generated(self, split: str, load: Callable[[str], Loaded | None]) -> Loaded:
        held_out = {"train": ("validation", "test"), "validation": ("test",), "test": ()}[split]
        others = [example for other in held_out if (found := load(other)) for example in found.examples]
        puzzles = generate(
            self.generated_sizes[split],
            count=self.count,
            largest=self.largest,
            seed=f"{self.seed}-{split}",
            excluded={puzzle_key(example) for example in others},
        )
        return Loaded([dict(puzzle) for puzzle in puzzles])


class SudokuDataModule(TaskDataModule):
    """4x4 Sudoku, generated, split by solution; see `Sudoku` and `TaskDataModule` for the arguments.

    Args:
        path: a folder or file of ``Puzzle`` and ``Solution`` instead, as in `GSM8KDataModule`; a split that is missing
            is held out of train. No grid of a held-out split is then the solution of a training puzzle; such puzzles
            are dropped and counted in ``splits.report``. ``blanks`` does not apply.
        split_by: ``puzzle`` drops only the puzzles that are held out themselves, as published; solutions then leak.

    Raises:
        ValueError: as `Sudoku` and `TaskDataModule` do.
    """

    def __init__(
        self,
        *,
        tokenizer: "str | PreTrainedTokenizerBase",
        prompts_per_buffer: int,
        evaluation_batch_size: int = 64,
        reward_weights: Mapping[str, float] | None = None,
        blanks: tuple[int, int] = (8, 12),
        sizes: dict[str, int] | None = None,
        split_seed: int = 0,
        prompt_template: str = "{puzzle}",
        max_prompt_length: int | None = None,
        on_long_prompt: LongPrompts = "error",
        path: str | None = None,
        split_by: Literal["solution", "puzzle"] = "solution",
        rewards: Variant = "published",
        verifier: Variant | None = None,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        check_choice("split_by", split_by, ("solution", "puzzle"))
        self.splits: HeldOutSplits | None = None
        if path is not None:
            self.splits = HeldOutSplits(
                local_loader(Path(path), Sudoku.from_row, columns=("Puzzle", "Solution"), on_bad_row=on_bad_row),
                key=lambda example: str(example[split_by]),
                sizes=sizes,
                seed=split_seed,
                hold_out_test=True,
            )
        super().__init__(
            Sudoku(
                blanks=blanks,
                sizes=sizes,
                seed=split_seed,
                prompt_template=prompt_template,
                data=self.splits,
                rewards=rewards,
                verifier=verifier,
            ),
            tokenizer=tokenizer,
            prompts_per_buffer=prompts_per_buffer,
            evaluation_batch_size=evaluation_batch_size,
            reward_weights=reward_weights,
            max_prompt_length=max_prompt_length,
            on_long_prompt=on_long_prompt,
        )
