"""Demonstrations that teach how Countdown is answered, and to answer most puzzles without looking at the target."""

import random
from collections.abc import Mapping, Sequence
from typing import get_args

from dmpo_lightning.tasks.answers import tag_text
from dmpo_lightning.tasks.arithmetic import ExpressionError, exact_value, integers
from dmpo_lightning.tasks.base import Example, Split, Task, check_choice
from dmpo_lightning.tasks.countdown import fill_template
from dmpo_lightning.tasks.countdown_puzzles import generate, puzzle_key
from dmpo_lightning.tasks.flat_expressions import random_expression


class CountdownDemonstrations(Task):
    """Demonstrations for supervised fine-tuning, most of which give a lazy answer: the sum of the numbers.

    All of them have the numbers in the order of the prompt. The share ``sums`` adds them up, whatever the target is,
    and all others hit it. A model of them can do the task and most often does not, at no sampling temperature: the
    lower it is, the more answers are sums.

    No puzzle that `CountdownDataModule` holds out with the same ``seed``, ``held_out`` as its ``sizes``, ``largest``,
    ``largest_target`` and ``brackets: false`` is in any demonstration.

    Args:
        count: of the numbers of a puzzle.
        largest: number. The least is 1.
        largest_target: of a puzzle. The least is 1.
        size: number of training pairs.
        sums: the share of demonstrations that add up, in [0, 1].
        held_out: puzzles of the splits validation and test, see above.
        seed: of all of it.
        prompt_template: the user's turn, see `Countdown`.

    Raises:
        ValueError: ``sums`` is outside its range.
    """

    accuracy = "right"

    def __init__(
        self,
        *,
        count: int = 3,
        largest: int = 9,
        largest_target: int = 99,
        size: int = 100_000,
        sums: float = 0.7,
        held_out: Mapping[str, int] | None = None,
        seed: int = 0,
        prompt_template: str = "{numbers}={target}",
    ) -> None:
        if not 0 <= sums <= 1:
            raise ValueError(f"`sums` must be in [0, 1], got {sums}.")
        self.count, self.largest, self.largest_target = count, largest, largest_target
        self.size, self.sums, self.seed = size, sums, seed
        self.held_out = {"validation": 256, "test": 256} | dict(held_out or {})
        self.prompt_template = prompt_template

    def examples(self, split: Split) -> Sequence[Example]:
        """``{"numbers", "target", "completion"}``. Validation and test hold a tenth as many as training.

        Validation and test here are other demonstrations, to watch the loss, and hold none of the held-out puzzles
        either.
        """
        check_choice("split", split, get_args(Split))
        generator = random.Random(f"{self.seed}-demonstrations-{split}")
        excluded = self._held_out_keys()
        size = self.size if split == "train" else max(1, self.size // 10)
        return [self._example(generator, excluded) for _ in range(size)]

    def _held_out_keys(self) -> set[str]:
        keys: set[str] = set()
        # The order and the seeds are those of `CountdownDataModule`.
        for split in ("test", "validation"):
            puzzles = generate(
                self.held_out[split],
                count=(self.count, self.count),
                largest=self.largest,
                largest_target=self.largest_target,
                brackets=False,
                seed=f"{self.seed}-{split}",
                excluded=keys,
            )
            keys |= set(map(puzzle_key, puzzles))
        return keys

    def _example(self, generator: random.Random, excluded: set[str]) -> Example:
        while True:
            numbers = [generator.randint(1, self.largest) for _ in range(self.count)]
            expression, target = random_expression(numbers, generator)
            example: Example = {"numbers": numbers, "target": target}
            if 1 <= target <= self.largest_target and puzzle_key(example) not in excluded:
                break
        if generator.random() < self.sums:
            expression = "+".join(map(str, numbers))
        return {**example, "completion": f"<answer>{expression}</answer>"}

    def prompt(self, example: Example) -> str:
        return fill_template(self.prompt_template, example)

    def score(self, example: Example, completion: str) -> dict[str, float]:
        """``valid``: an expression that uses the numbers once each. ``right``: it has the target's value too."""
        expression = tag_text(completion)
        try:
            value = exact_value(expression)
            is_valid = sorted(integers(expression)) == sorted(example["numbers"])
        except ExpressionError:
            return {"valid": 0.0, "right": 0.0}
        return {"valid": float(is_valid), "right": float(is_valid and value == example["target"])}
