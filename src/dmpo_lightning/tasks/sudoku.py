"""4x4 Sudoku: every grid, puzzles with one solution, splits by solution, and the published per-cell reward."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import permutations
from typing import Any

from dmpo_lightning.tasks.answers import tag_text
from dmpo_lightning.tasks.base import Example, Split, Task, Variant, Verdict
from dmpo_lightning.tasks.benchmark import MAX_COMPLETION, Benchmark
from dmpo_lightning.tasks.sudoku_answers import first_digits, published_answer, verified_answer

CELLS = 16
HELD_OUT_GRIDS = {"validation": 24, "test": 48}
"""Of the 288 complete grids; the other 216 are for training."""
INSTRUCTION = """
Please solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character string reading left-to-right, \
top-to-bottom, where '0' represents empty cells.

Rules:
- Fill empty cells with digits 1-4
- Each row must contain digits 1-4 exactly once
- Each column must contain digits 1-4 exactly once
- Each 2x2 box must contain digits 1-4 exactly once

Important: Your solution must be a COMPLETE 16-character string with only the digits 1-4, representing your final \
solved grid.

Respond in this exact format:
<reasoning>
Your step-by-step solving process
</reasoning>
<answer>
[16-character solution string with no spaces or separators]
</answer>
"""


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


@cache
def sudoku_grids() -> tuple[str, ...]:
    """All 288 complete 4x4 Sudoku grids: the Latin squares whose 2x2 boxes hold four different digits."""
    boxes = [[row * 4 + column + offset for offset in (0, 1, 4, 5)] for row in (0, 2) for column in (0, 2)]
    return tuple(grid for grid in latin_squares() if all(len({grid[cell] for cell in box}) == 4 for box in boxes))


@cache
def _grids_with() -> dict[tuple[int, str], int]:
    """For a cell and a digit, the set of grids that have it there, as a bit set over `sudoku_grids`."""
    return {
        (cell, digit): sum(1 << index for index, grid in enumerate(sudoku_grids()) if grid[cell] == digit)
        for cell in range(CELLS)
        for digit in "1234"
    }


def solutions(puzzle: str) -> list[str]:
    """Every grid that agrees with the clues; ``0`` marks a blank."""
    remaining = _remaining_grids(puzzle)
    return [grid for index, grid in enumerate(sudoku_grids()) if remaining >> index & 1]


def has_one_solution(puzzle: str) -> bool:
    """Whether the clues determine the grid."""
    return _remaining_grids(puzzle).bit_count() == 1


def _remaining_grids(puzzle: str) -> int:
    remaining = (1 << len(sudoku_grids())) - 1
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            remaining &= _grids_with().get((cell, digit), 0)
    return remaining


def blank_out(grid: str, blanks: int, generator: random.Random) -> str:
    """The grid with ``blanks`` random cells replaced by ``0``."""
    hidden = set(generator.sample(range(CELLS), blanks))
    return "".join("0" if cell in hidden else digit for cell, digit in enumerate(grid))


def correct_cells(puzzle: str, solution: str, answer: str) -> tuple[int, int]:
    """Blank cells filled as in the solution, and blank cells; the answer is cut to 16 characters or padded with 0."""
    padded = answer[:CELLS].ljust(CELLS, "0")
    blank = [cell for cell in range(CELLS) if puzzle[cell] == "0"]
    return sum(padded[cell] == solution[cell] for cell in blank), len(blank)


class Sudoku(Benchmark):
    """4x4 Sudoku puzzles with exactly one solution, split by solution: no grid of one split appears in another; or the
    puzzles of ``data``. An example holds ``puzzle`` and ``solution``.

    Score components: ``cells``, the share of the blank cells equal to the solution, which is the whole reward unless
    weights say otherwise, and ``solved``, 1 for a completely right grid. With rewards ``published`` the digits of the
    last <answer> are read; with ``verified`` an answer counts only if it is 16 digits that keep the clues. A
    ``verifier`` adds its own ``correct_cells`` (share of the blanks) and ``correct`` (all of them), neither of them
    part of the reward.

    Args:
        data: examples by split, instead of generated ones.
        blanks: least and most blank cells, both between 1 and 12 (four clues are the least that can determine a 4x4
            grid).
        sizes: number of different puzzles per split.
        seed: of the split and the puzzles.
        prompt_template: the user's turn instead of that of the style; ``{puzzle}`` is replaced by 16 digits, 0 for a
            blank.
        rewards: ``published`` or ``verified`` reading of the answer for ``cells`` and ``solved``.
        verifier: the answer check to report beside them; its published number, `correct_cells`, is then the accuracy
            under ``published``, ``correct`` under ``verified``. None reports ``solved``.
        options: ``prompt_style`` (both styles are published with the same words), ``system_prompt``, ``instruction``,
            ``few_shot`` and ``prefill`` of `Benchmark`.

    Raises:
        ValueError: as of `Benchmark`; blanks outside that range, an unknown or empty split, a template without
            ``{puzzle}`` or beside an ``instruction``; more puzzles than exist (when asked for).
    """

    components = dict.fromkeys(("published", "verified"), ("cells", "solved"))
    columns = ("Puzzle", "Solution")
    instructions = {"train": INSTRUCTION, "eval": INSTRUCTION}

    def __init__(
        self,
        data: Mapping[str, Sequence[Example]] | None = None,
        *,
        blanks: tuple[int, int] = (8, 12),
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
        prompt_template: str | None = None,
        rewards: Variant = "verified",
        verifier: Variant | None = "verified",
        **options: Any,
    ) -> None:
        super().__init__(data, rewards=rewards, verifier=verifier or "verified", **options)
        if not 1 <= blanks[0] <= blanks[1] <= 12:
            raise ValueError(f"`blanks` must be two counts with 1 <= least <= most <= 12, got {blanks}.")
        if prompt_template is not None and "{puzzle}" not in prompt_template:
            raise ValueError(f"`prompt_template` must contain {{puzzle}}, got {prompt_template!r}.")
        if prompt_template is not None and options.get("instruction") is not None:
            raise ValueError("`prompt_template` is the whole of the user's turn; leave it out, or `instruction`.")
        self.blanks, self.seed, self.prompt_template = blanks, seed, prompt_template
        self.sizes = {"train": 4096, "validation": 512, "test": 1024} | dict(sizes or {})
        self.is_generated = data is None
        self.verifier = verifier
        self.reward_weights = {"cells": 1.0}  # published; `solved` is for the log, or for weights of one's own
        self.accuracy = {None: "solved", "published": "correct_cells", "verified": "correct"}[verifier]
        for split, size in self.sizes.items():
            if split not in ("train", "validation", "test") or size < 1:
                raise ValueError(
                    f"`sizes` must map train, validation or test to a positive count, got {split}: {size}."
                )

    @cached_property
    def grids(self) -> dict[str, list[str]]:
        """The complete grids of each split."""
        shuffled = random.Random(f"{self.seed}-grids").sample(sudoku_grids(), len(sudoku_grids()))
        test, validation = HELD_OUT_GRIDS["test"], HELD_OUT_GRIDS["validation"]
        return {
            "test": shuffled[:test],
            "validation": shuffled[test : test + validation],
            "train": shuffled[test + validation :],
        }

    def examples(self, split: Split) -> Sequence[Example]:
        """Distinct puzzles with their one solution: ``{"puzzle", "solution"}``."""
        if not self.is_generated:
            return super().examples(split)
        generator = random.Random(f"{self.seed}-{split}")
        puzzles: dict[str, str] = {}
        for attempt, (puzzle, solution) in enumerate(self._candidates(split, generator)):
            puzzles[puzzle] = solution
            if len(puzzles) == self.sizes[split]:
                return [{"puzzle": puzzle, "solution": solution} for puzzle, solution in puzzles.items()]
            if attempt > 100 * self.sizes[split]:
                raise ValueError(
                    f"Found only {len(puzzles)} different {split} puzzles with {self.blanks[0]}-{self.blanks[1]} "
                    f"blanks, "
                    f"but `sizes` asks for {self.sizes[split]}; ask for fewer or widen `blanks`."
                )
        raise AssertionError("candidates never end")

    def _candidates(self, split: Split, generator: random.Random) -> Iterator[tuple[str, str]]:
        while True:
            solution, blanks = generator.choice(self.grids[split]), generator.randint(*self.blanks)
            puzzle = blank_out(solution, blanks, generator)
            while not has_one_solution(puzzle):
                puzzle = blank_out(solution, blanks, generator)
            yield puzzle, solution

    def task_text(self, example: Example) -> str:
        return f"Solve the following Sudoku puzzle: {example['puzzle']}\n"

    def _user_turn(self, example: Example) -> str:
        if self.prompt_template is None:
            return super()._user_turn(example)
        return self.prompt_template.replace("{puzzle}", example["puzzle"])

    def training_components(self, example: Example, completion: str) -> dict[str, float]:
        if self.rewards == "published":
            answer = first_digits(tag_text(completion))
        else:
            answer = verified_answer(example["puzzle"], completion) or ""
        correct, blanks = correct_cells(example["puzzle"], example["solution"], answer)
        return {"cells": correct / blanks if blanks else 1.0, "solved": float(correct == blanks)}

    def score(self, example: Example, completion: str) -> dict[str, float]:
        """``cells`` and ``solved`` of prefill and completion; beside them what a verifier finds in the completion."""
        completion = completion[:MAX_COMPLETION]
        components = self.training_components(example, self.prefill + completion)
        if self.verifier is not None:
            verdict = self.verdict(example, completion)
            cells, blanks = verdict.correct_cells or 0, verdict.blank_cells
            components["correct_cells"] = cells / blanks if blanks else float(verdict.correct)
            components["correct"] = float(verdict.correct)
        return components

    def verdict(self, example: Example, completion: str) -> Verdict:
        """The answer check ``verifier`` (``verified`` if there is none): published pads and cuts what it finds."""
        published = self.verifier == "published"
        answer = published_answer(completion) if published else verified_answer(example["puzzle"], completion)
        correct, blanks = correct_cells(example["puzzle"], example["solution"], answer or "")
        return Verdict(answer, answer is not None and correct == blanks, correct, blanks)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Example:
        """From ``Puzzle`` and ``Solution`` of 16 digits; raises ValueError if they contradict each other."""
        puzzle, solution = (str(row[column]).strip().zfill(CELLS) for column in ("Puzzle", "Solution"))
        if len(puzzle) != CELLS or solution not in sudoku_grids():
            raise ValueError("`Puzzle` must be 16 digits and `Solution` a complete 4x4 grid")
        if any(clue not in ("0", digit) for clue, digit in zip(puzzle, solution, strict=True)):
            raise ValueError("`Solution` contradicts the clues of `Puzzle`")
        return {"puzzle": puzzle, "solution": solution}

    @classmethod
    def from_saved(cls, record: Mapping[str, Any]) -> Example:
        """The puzzle is the 16 digits of ``question``, the solution ``ground_truth``."""
        found = re.search(r"(?<!\d)[0-4]{16}(?!\d)", record["question"])
        if found is None:
            raise ValueError("`question` holds no puzzle of 16 digits")
        return {"puzzle": found.group(), "solution": str(record["ground_truth"])}


class LatinSquareDemonstrations(Task):
    """Demonstrations for supervised fine-tuning that teach the format and *Latin squares*, not Sudoku.

    Half of the Latin squares break the boxes of Sudoku, and ``corruption`` of the blanks are answered with a random
    digit. A model of
    them therefore has something to learn that no sampling temperature gives it.

    Args:
        blanks: least and most blank cells.
        size: number of training pairs.
        corruption: share in [0, 1] of the blanks whose answer is a random digit.
        seed: of all of it.
        prompt_template: the user's turn; ``{puzzle}`` is replaced by 16 digits, 0 for a blank.
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
        """``{"puzzle", "completion"}`` pairs; validation and test hold a tenth as many."""
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
        return self.prompt_template.replace("{puzzle}", example["puzzle"])

    def score(self, example: Example, completion: str) -> dict[str, float]:
        answer, puzzle = tag_text(completion), example["puzzle"]
        keeps_clues = len(answer) == CELLS and all(
            clue in ("0", digit) for clue, digit in zip(puzzle, answer, strict=True)
        )
        return {"latin": float(keeps_clues and answer in latin_squares()), "clues": float(keeps_clues)}
