"""Latin squares of order 4, puzzles made of such grids, and demonstrations that teach them."""

import random
from collections.abc import Sequence
from functools import cache
from itertools import permutations
from typing import get_args

from dmpo_lightning.tasks.answers import tag_text
from dmpo_lightning.tasks.base import Example, Split, Task, check_choice

CELLS = 16


@cache
def latin_squares() -> tuple[str, ...]:
    """All 576 Latin squares of order 4 as 16 digits, rows first, in lexicographic order."""
    rows = [a + b + c + d for a, b, c, d in permutations("1234")]
    squares = (
        "".join(square)
        for square in permutations(rows, 4)
        if all(len(set(column)) == 4 for column in zip(*square, strict=True))
    )
    return tuple(sorted(squares))


def keeps_clues(puzzle: str, grid: str) -> bool:
    """Whether a text has 16 characters, and each digit of the puzzle in its place. ``0`` marks a blank."""
    return len(grid) == CELLS and all(clue in ("0", digit) for clue, digit in zip(puzzle, grid, strict=True))


def blank_out(grid: str, blanks: int, generator: random.Random) -> str:
    """The grid with ``blanks`` random cells replaced by ``0``."""
    hidden = set(generator.sample(range(CELLS), blanks))
    return "".join("0" if cell in hidden else digit for cell, digit in enumerate(grid))


class LatinSquareDemonstrations(Task):
    """Demonstrations for supervised fine-tuning that teach the format and *Latin squares*, not Sudoku.

    Half of the Latin squares break the boxes of Sudoku, and ``corruption`` of the blanks are answered with a random
    digit. A model of them therefore has something to learn that no sampling temperature gives it.

    Args:
        blanks: least and most blank cells.
        size: number of training pairs.
        corruption: share in [0, 1] of the blanks whose answer is a random digit.
        seed: of all of it.
        prompt_template: the user's turn. ``{puzzle}`` is replaced by 16 digits, 0 for a blank.
    """

    accuracy = "latin"

    def __init__(
        self,
        *,
        blanks: tuple[int, int] = (8, 13),
        size: int = 100_000,
        corruption: float = 0.2,
        seed: int = 0,
        prompt_template: str = "{puzzle}",
    ) -> None:
        if not 1 <= blanks[0] <= blanks[1] <= CELLS:
            raise ValueError(f"`blanks` must be two counts with 1 <= least <= most <= {CELLS}, got {blanks}.")
        if not 0 <= corruption <= 1:
            raise ValueError(f"`corruption` must be in [0, 1], got {corruption}.")
        self.blanks, self.size, self.corruption, self.seed = blanks, size, corruption, seed
        self.prompt_template = prompt_template

    def examples(self, split: Split) -> Sequence[Example]:
        """``{"puzzle", "completion"}`` pairs. Validation and test hold a tenth as many as training."""
        check_choice("split", split, get_args(Split))
        generator = random.Random(f"{self.seed}-latin-{split}")
        return [self._example(generator) for _ in range(self.size if split == "train" else max(1, self.size // 10))]

    def _example(self, generator: random.Random) -> Example:
        square = generator.choice(latin_squares())
        puzzle = blank_out(square, generator.randint(*self.blanks), generator)
        answer = "".join(
            generator.choice("1234") if clue == "0" and generator.random() < self.corruption else digit
            for clue, digit in zip(puzzle, square, strict=True)
        )
        return {"puzzle": puzzle, "completion": f"<answer>{answer}</answer>"}

    def prompt(self, example: Example) -> str:
        # `format` would stumble over other braces of the template.
        return self.prompt_template.replace("{puzzle}", example["puzzle"])

    def score(self, example: Example, completion: str) -> dict[str, float]:
        answer, puzzle = tag_text(completion), example["puzzle"]
        keeps = keeps_clues(puzzle, answer)
        return {"latin": float(keeps and answer in latin_squares()), "clues": float(keeps)}
