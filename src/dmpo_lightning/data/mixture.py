"""Several tasks in one run: prompts drawn by weight, each task with its own prompts, reward and accuracy."""

import random
from collections.abc import Mapping
from itertools import accumulate
from math import inf
from typing import Any

from dmpo_lightning.data.prompts import PromptLoader
from dmpo_lightning.data.task_module import PromptDataModule, TaskDataModule
from dmpo_lightning.data.tokens import named
from dmpo_lightning.rewards.mixture import MixtureReward
from dmpo_lightning.tasks.base import Example, Split


class MixtureDataModule(PromptDataModule):
    """Several tasks in one run. Each keeps its prompts, prefill, reward with weights, accuracy and limits of length.

    An example gets the key ``task``, the name of its task. The reward logs ``gsm8k/correctness`` and so on. Of every
    task it logs ``reward`` and ``accuracy`` too, and also the ``accuracy`` of all. An epoch has as many prompts as the
    tasks have examples together. Evaluation takes every example of every task once. It interleaves the tasks, so that a
    limited number of batches sees all of them in proportion.

    Args:
        datamodules: by the name of the task. Their own tokenizer and batch sizes are not used.
        weights: shares of the tasks in the training prompts, of any sum. Within an epoch they hold exactly but for
            rounding. A small task repeats, and of a large one each epoch takes the next part. None takes each example
            once per epoch.
        options: ``tokenizer``, ``prompts_per_buffer`` and ``evaluation_batch_size`` of `PromptDataModule`.

    Raises:
        ValueError: no task, a name with a slash, weights that do not fit the tasks, and as the datamodules do.

    Example:
        >>> from dmpo_lightning import CountdownDataModule, MixtureDataModule, SudokuDataModule
        >>> tasks = {"sudoku": SudokuDataModule(), "countdown": CountdownDataModule(source="generated")}
        >>> data = MixtureDataModule(tasks, weights={"sudoku": 1, "countdown": 3}, prompts_per_buffer=16)
    """

    def __init__(
        self,
        datamodules: dict[str, TaskDataModule],
        *,
        weights: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not datamodules or any("/" in name for name in datamodules):
            raise ValueError(f"`datamodules` must name its tasks, without a slash, got {sorted(datamodules)}.")
        if weights is not None and (set(weights) != set(datamodules) or not all(0 < w < inf for w in weights.values())):
            raise ValueError(
                f"`weights` must name the tasks {sorted(datamodules)} and be positive, got {weights}; leave out a task "
                "of weight 0."
            )
        self.datamodules, self.weights = datamodules, weights
        self.reward = MixtureReward({name: each.reward for name, each in datamodules.items()})

    def make_loader(self, split: Split, batch_size: int) -> "MixturePromptLoader":
        for each in self.datamodules.values():
            # One model reads all tasks, so their own tokenizers would be wrong.
            each.tokenizer = self.tokenizer
        loaders = {name: each.make_loader(split, batch_size) for name, each in self.datamodules.items()}
        return MixturePromptLoader(loaders, weights=self.weights, batch_size=batch_size)


class MixturePromptLoader(PromptLoader):
    """The prompts of several loaders, all of one split, in one loader.

    A prompt's index is its position in all examples, task after task.

    Args:
        loaders: by the name of the task. Each keeps its prompts and what it drops as too long.
        weights: of the tasks in training, see `MixtureDataModule`.
        batch_size: prompts per batch and rank.

    Raises:
        ValueError: an example that has a key ``task``, or is no mapping. A weight that leaves a task without a
            prompt in an epoch (when it starts).
    """

    def __init__(
        self, loaders: Mapping[str, PromptLoader], *, weights: Mapping[str, float] | None = None, batch_size: int
    ) -> None:
        self.loaders, self.weights = dict(loaders), weights
        first = next(iter(self.loaders.values()))
        examples = [_named(name, example) for name, loader in self.loaders.items() for example in loader.dataset]
        super().__init__(examples, first.tokenizer, batch_size=batch_size, shuffle=first.shuffle)
        starts = accumulate((len(loader.dataset) for loader in self.loaders.values()), initial=0)
        # `accumulate` ends with the total, where no loader starts.
        kept = zip(self.loaders.items(), starts, strict=False)
        self._by_task = {name: [start + index for index in loader.kept] for (name, loader), start in kept}
        self.kept = [index for indices in self._by_task.values() for index in indices]

    def check_prompt_length(self, limit: int) -> None:
        """As each of the loaders does it, which the error names."""
        for name, loader in self.loaders.items():
            with named(f"Task {name!r}"):
                loader.check_prompt_length(limit)

    def _tokenized(self) -> list[list[int]]:
        return [ids for loader in self.loaders.values() for ids in loader.token_ids]

    def _order(self) -> list[int]:
        if not self.shuffle or self._overfits:
            return self._interleaved()
        drawn = [index for name, count in self._prompts_per_epoch().items() for index in self._draw(name, count)]
        random.Random(f"{self.seed}-mixture-{self._epoch}").shuffle(drawn)
        return drawn

    def _interleaved(self) -> list[int]:
        """Every prompt once, the tasks spread evenly."""
        positions = [
            # The middle of a prompt's share of its task, by which tasks of any size are spread evenly over the whole.
            ((number + 0.5) / len(indices), index)
            for indices in self._by_task.values()
            for number, index in enumerate(indices)
        ]
        return [index for _, index in sorted(positions)]

    def _prompts_per_epoch(self) -> dict[str, int]:
        """Whole numbers in the proportion of the weights that add up to all prompts, by largest remainders."""
        # Rounding each share would lose or invent prompts, and an epoch would have another length than `len` says.
        total = len(self.kept)
        sizes = {name: len(indices) for name, indices in self._by_task.items()}
        weights = sizes if self.weights is None else self.weights
        exact = {name: total * weights[name] / sum(weights.values()) for name in sizes}
        counts = {name: int(share) for name, share in exact.items()}
        by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
        for name in by_remainder[: total - sum(counts.values())]:
            counts[name] += 1
        if without := [name for name, count in counts.items() if not count]:
            raise ValueError(f"`weights` give {without} no prompt in an epoch of {total}; raise them or leave it out.")
        return counts

    def _draw(self, name: str, count: int) -> list[int]:
        """The next ``count`` prompts of an endless row of shuffled passes over the task, in this epoch."""
        # A restart knows the epoch, not what earlier ones drew. So each pass is shuffled by its own number, and the
        # position in the row follows from the epoch, since every epoch takes equally many.
        indices = self._by_task[name]
        start = self._epoch * count
        passes = range(start // len(indices), (start + count - 1) // len(indices) + 1)
        row = [
            index
            for number in passes
            for index in random.Random(f"{self.seed}-{name}-{number}").sample(indices, len(indices))
        ]
        offset = start - passes[0] * len(indices)
        return row[offset : offset + count]


def _named(name: str, example: Any) -> Example:
    if not isinstance(example, Mapping) or "task" in example:
        raise ValueError(
            f"Examples in a mixture get the key `task`, so those of {name!r} must be mappings without one, "
            f"got {str(example)[:80]!r}."
        )
    return {"task": name, **example}
