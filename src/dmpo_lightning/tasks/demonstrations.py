"""Prompts with completions for supervised fine-tuning: from a file, and made so that they leave something to learn."""

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import get_args

from dmpo_lightning.tasks.answers import tag_text
from dmpo_lightning.tasks.arithmetic import ExpressionError, exact_value, integers
from dmpo_lightning.tasks.base import Example, Message, Split, Task, check_choice
from dmpo_lightning.tasks.countdown_puzzles import generate, puzzle_key, random_expression
from dmpo_lightning.tasks.json_lines import numbered_lines
from dmpo_lightning.tasks.sudoku import blank_out, keeps_clues, latin_squares

NUMBERS, LARGEST, LARGEST_TARGET = 3, 9, 99
"""Of a demonstrated Countdown puzzle."""


class JsonlPairs(Task):
    """Pairs from a JSON-lines file in UTF-8: ``prompt`` (a string, or a list of messages) and ``completion`` per line.

    Args:
        path: of the file.
        validation_share: the share of the pairs that is kept for validation, in [0, 1). These are spread evenly. Above
            0 at least one of two pairs or more is kept.

    Raises:
        ValueError: no such file, or (when read) no pair in it, or a line that is no such pair, named by file and line.

    Example:
        >>> from pathlib import Path
        >>> from dmpo_lightning import JsonlPairs
        >>> written = Path("pairs.jsonl").write_text('{"prompt": "2 + 2?", "completion": "4"}')
        >>> JsonlPairs("pairs.jsonl", validation_share=0.0).examples("train")[0]
        {'prompt': '2 + 2?', 'completion': '4'}
    """

    accuracy = "exact"

    def __init__(self, path: str, *, validation_share: float = 0.02) -> None:
        if not Path(path).is_file():
            raise ValueError(
                f"No file {path!r}; `path` must name a JSON-lines file with a prompt and a completion per line."
            )
        if not 0 <= validation_share < 1:
            raise ValueError(f"`validation_share` must be in [0, 1), got {validation_share}.")
        self.path, self.validation_share = path, validation_share

    @cached_property
    def pairs(self) -> list[Example]:
        """All pairs, in the order of the file."""
        pairs: list[Example] = []
        for number, pair in numbered_lines(self.path):
            fields = pair if isinstance(pair, dict) else {}
            # What a conversation must be is checked where it becomes tokens.
            if not (isinstance(fields.get("prompt"), str | list) and isinstance(fields.get("completion"), str)):
                raise ValueError(
                    f"{self.path}, line {number}: needs `prompt` (a string, or a list of messages) and a string "
                    f"`completion`, got {str(pair)[:120]}; mend or remove the line."
                )
            pairs.append(pair)
        if not pairs:
            raise ValueError(f"{self.path} holds no pair; give a file with a prompt and a completion per line.")
        return pairs

    def examples(self, split: Split) -> Sequence[Example]:
        check_choice("split", split, get_args(Split))
        held_out = self._held_out()
        return [pair for index, pair in enumerate(self.pairs) if (index in held_out) == (split != "train")]

    def _held_out(self) -> set[int]:
        """The places of the pairs that are kept for validation."""
        count = len(self.pairs)
        # Of the number as it was written: 0.07 as a float is a little more, and its multiples would be now and then.
        share = Fraction(str(self.validation_share))
        # Each pair with which the share of those so far reaches the next whole number.
        places = {index for index in range(count) if int((index + 1) * share) > int(index * share)}
        # A share of few pairs is less than one, but a checkpoint that is chosen by `val/loss` needs one.
        return places or ({count - 1} if share and count > 1 else set())

    def prompt(self, example: Example) -> str | Sequence[Message]:
        return example["prompt"]

    def score(self, example: Example, completion: str) -> dict[str, float]:
        return {"exact": float(completion.strip() == example["completion"].strip())}


class LatinSquareDemonstrations(Task):
    """Demonstrations for supervised fine-tuning that teach the format and *Latin squares*, not Sudoku.

    Half of the Latin squares break the boxes of Sudoku, and ``corruption`` of the blanks are answered with a random
    digit. A model of them therefore has something to learn that no sampling temperature gives it.

    A puzzle has 8 to 13 blanks. The prompt is its 16 digits, 0 for a blank.

    Args:
        size: number of training pairs. Validation and test hold a tenth as many.
        corruption: share in [0, 1] of the blanks whose answer is a random digit.
        seed: of all of it.

    Example:
        >>> from dmpo_lightning import LatinSquareDemonstrations
        >>> LatinSquareDemonstrations(size=10).examples("train")[0]
        {'puzzle': '2000000000010024', 'completion': '<answer>2143341441311324</answer>'}
    """

    accuracy = "latin"

    def __init__(self, *, size: int = 100_000, corruption: float = 0.2, seed: int = 0) -> None:
        if not 0 <= corruption <= 1:
            raise ValueError(f"`corruption` must be in [0, 1], got {corruption}.")
        self.size, self.corruption, self.seed = size, corruption, seed

    def examples(self, split: Split) -> Sequence[Example]:
        """``{"puzzle", "completion"}`` pairs."""
        generator = random.Random(f"{self.seed}-latin-{split}")
        return [self._example(generator) for _ in range(_size(self.size, split))]

    def _example(self, generator: random.Random) -> Example:
        square = generator.choice(latin_squares())
        puzzle = blank_out(square, generator.randint(8, 13), generator)
        answer = "".join(
            generator.choice("1234") if clue == "0" and generator.random() < self.corruption else digit
            for clue, digit in zip(puzzle, square, strict=True)
        )
        return {"puzzle": puzzle, "completion": f"<answer>{answer}</answer>"}

    def prompt(self, example: Example) -> str:
        return str(example["puzzle"])

    def score(self, example: Example, completion: str) -> dict[str, float]:
        answer, puzzle = tag_text(completion), example["puzzle"]
        keeps = keeps_clues(puzzle, answer)
        return {"latin": float(keeps and answer in latin_squares()), "clues": float(keeps)}


class CountdownDemonstrations(Task):
    """Demonstrations for supervised fine-tuning, most of which give a lazy answer: the sum of the numbers.

    All of them have the numbers in the order of the prompt. The share ``sums`` adds them up, whatever the target is,
    and all others hit it. A model of them can do the task and most often does not, at no sampling temperature: the
    lower it is, the more answers are sums.

    A puzzle has three numbers from 1 to 9 and a target from 1 to 99, and the prompt is ``2 3 7=13``. No puzzle that
    `CountdownDataModule` holds out is in any demonstration, with the same ``seed``, ``held_out`` as its ``sizes``,
    ``largest: 9``, ``largest_target: 99`` and ``brackets: false``.

    Args:
        size: number of training pairs. Validation and test hold a tenth as many: other demonstrations, to watch the
            loss.
        sums: the share of demonstrations that add up, in [0, 1].
        held_out: puzzles of the splits validation and test, see above.
        seed: of all of it.

    Raises:
        ValueError: ``sums`` is outside its range.

    Example:
        >>> from dmpo_lightning import CountdownDemonstrations
        >>> CountdownDemonstrations(size=10).examples("train")[0]
        {'numbers': [9, 6, 9], 'target': 12, 'completion': '<answer>9+6+9</answer>'}
    """

    accuracy = "right"

    def __init__(
        self,
        *,
        size: int = 100_000,
        sums: float = 0.7,
        held_out: Mapping[str, int] | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= sums <= 1:
            raise ValueError(f"`sums` must be in [0, 1], got {sums}.")
        self.size, self.sums, self.seed = size, sums, seed
        self.held_out = {"validation": 256, "test": 256} | dict(held_out or {})

    def examples(self, split: Split) -> Sequence[Example]:
        """``{"numbers", "target", "completion"}``."""
        generator = random.Random(f"{self.seed}-demonstrations-{split}")
        excluded = self._held_out_keys()
        return [self._example(generator, excluded) for _ in range(_size(self.size, split))]

    def _held_out_keys(self) -> set[str]:
        keys: set[str] = set()
        # The order and the seeds are those of `CountdownDataModule`.
        for split in ("test", "validation"):
            puzzles = generate(
                self.held_out[split],
                count=(NUMBERS, NUMBERS),
                largest=LARGEST,
                largest_target=LARGEST_TARGET,
                brackets=False,
                seed=f"{self.seed}-{split}",
                excluded=keys,
            )
            keys |= set(map(puzzle_key, puzzles))
        return keys

    def _example(self, generator: random.Random, excluded: set[str]) -> Example:
        while True:
            numbers = [generator.randint(1, LARGEST) for _ in range(NUMBERS)]
            expression, target = random_expression(numbers, generator)
            example: Example = {"numbers": numbers, "target": target}
            if 1 <= target <= LARGEST_TARGET and puzzle_key(example) not in excluded:
                break
        if generator.random() < self.sums:
            expression = "+".join(map(str, numbers))
        return {**example, "completion": f"<answer>{expression}</answer>"}

    def prompt(self, example: Example) -> str:
        return f"{' '.join(map(str, example['numbers']))}={example['target']}"

    def score(self, example: Example, completion: str) -> dict[str, float]:
        """``valid``: an expression that uses the numbers once each. ``right``: it has the target's value too."""
        expression = tag_text(completion)
        try:
            value = exact_value(expression)
            is_valid = sorted(integers(expression)) == sorted(example["numbers"])
        except ExpressionError:
            return {"valid": 0.0, "right": 0.0}
        return {"valid": float(is_valid), "right": float(is_valid and value == example["target"])}


def _size(size: int, split: Split) -> int:
    """The number of pairs of a split, of which training has ``size``."""
    check_choice("split", split, get_args(Split))
    return size if split == "train" else max(1, size // 10)
