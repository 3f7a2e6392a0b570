"""4x4 Sudoku: every grid, puzzles with one solution, splits by solution, the published per-cell reward and checks."""

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from itertools import islice, permutations
from typing import Any, get_args

from dmpo_lightning.tasks.answers import final_answer, last_block
from dmpo_lightning.tasks.base import Example, Share, Split, Verdict, check_choice, check_sizes
from dmpo_lightning.tasks.benchmark import Benchmark
from dmpo_lightning.tasks.numbers import plain

CELLS = 16
HELD_OUT_GRIDS = {"validation": 24, "test": 48}
"""Of the 288 complete grids. The other 216 are for training."""
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
_ENDS = ("<|eot_id|>", "<|endoftext|>")
_LAYOUT = re.compile(r"\\[a-zA-Z]+(?:\{[a-zA-Z|*]*\})*|</?[a-zA-Z]+ ?/?>|[^\w.]|_|\.(?![0-9])")
_WORD_OF_DIGITS = re.compile(rf"(?<!\w)\d{{{CELLS}}}(?!\w)")


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


@cache
def sudoku_grids() -> tuple[str, ...]:
    """All 288 complete 4x4 Sudoku grids: the Latin squares whose 2x2 boxes hold four different digits."""
    boxes = [[row * 4 + column + offset for offset in (0, 1, 4, 5)] for row in (0, 2) for column in (0, 2)]
    return tuple(grid for grid in latin_squares() if all(len({grid[cell] for cell in box}) == 4 for box in boxes))


def solutions(puzzle: str) -> list[str]:
    """Every grid that agrees with the clues. ``0`` marks a blank."""
    grids = list(sudoku_grids())
    # Clue by clue few grids are left, because generating puzzles asks this of every candidate.
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            grids = [grid for grid in grids if grid[cell] == digit]
    return grids


def correct_cells(puzzle: str, solution: str, answer: str) -> tuple[int, int]:
    """The number of blank cells filled as in the solution, and of blank cells.

    The answer is cut to 16 characters or padded with 0.
    """
    # As published: cells that are missing are wrong, what is too much is ignored.
    padded = answer[:CELLS].ljust(CELLS, "0")
    blank = [cell for cell in range(CELLS) if puzzle[cell] == "0"]
    return sum(padded[cell] == solution[cell] for cell in blank), len(blank)


def _published(example: Example, answer: str) -> Verdict:
    """The verdict on what was read. A puzzle without blanks is never solved: the published code gives it 0."""
    correct, blanks = correct_cells(example["puzzle"], example["solution"], answer)
    return Verdict(answer, correct == blanks > 0, _share(correct, blanks))


def _share(correct: int, blanks: int) -> Share:
    return Share(correct, blanks, name="correct_cells", of_name="blank_cells")


def _cell_components(verdict: Verdict) -> dict[str, float]:
    return {"cells": verdict.components["correct_cells"], "solved": float(verdict.correct)}


def published_answer(completion: str) -> str:
    """The 16 characters that d1 reads: the first place around an answer tag that is not blank.

    White space is dropped and the rest cut or padded with 0. The answer is empty if every place is blank.
    """
    # The order is that of the published patterns.
    places = (_fenced, _tagged, _behind_tag, _digits_before_tag, _digits_anywhere)
    answer = next((text for place in places if (text := "".join(place(completion).split())[:CELLS])), "")
    return answer.ljust(CELLS, "0") if answer else ""


def first_digits(text: str) -> str:
    """The first 16 characters that ``isdigit`` calls digits. They need not be ASCII, and ``²`` is one too."""
    return "".join(islice(filter(str.isdigit, text), CELLS))


def _fenced(text: str) -> str:
    """Digits in the first code fence behind the first opening tag."""
    start = text.find("<answer>")
    match = re.compile(r"```([\d\s]+)```").search(text, start + 8) if start >= 0 else None
    return match.group(1) if match else ""


def _tagged(text: str) -> str:
    start = text.find("<answer>")
    if start < 0:
        return ""
    ends = [end for mark in (*_ENDS, "</answer>") if (end := text.find(mark, start + 8)) >= 0]
    return text[start + 8 : min(ends)] if ends else ""


def _behind_tag(text: str) -> str:
    start = text.find("</answer>")
    if start < 0:
        return ""
    ends = [end for mark in _ENDS if (end := text.find(mark, start + 9)) >= 0]
    return text[start + 9 : min(ends, default=len(text))]


def _digits_before_tag(text: str) -> str:
    """The first 16 digits with a closing tag behind them."""
    # Backwards the tag comes before the digits, so that few places can be the start of a match. From the front every
    # digit of a long number could, and the white space behind each would be read again.
    backwards = re.findall(r">rewsna/<\s*(\d{16})", text[::-1])
    return backwards[-1][::-1] if backwards else ""


def _digits_anywhere(text: str) -> str:
    """The first 16 digits that stand alone between word boundaries."""
    # Any 16 neighbours hold one of every 16th character of the text: only around those that are digits need be
    # searched.
    for digits in re.finditer(r"\d+", text[CELLS - 1 :: CELLS]):
        match = _WORD_OF_DIGITS.search(text, CELLS * digits.start(), CELLS * digits.end() + CELLS)
        if match:
            return match.group()
    return ""


def verified_answer(puzzle: str, completion: str) -> str | None:
    """The last answer, if it is a grid of 16 digits that keeps the clues, else None.

    Whatever is no letter and no digit is layout, and so are tags and commands of LaTeX.
    """
    answer = _LAYOUT.sub("", plain(final_answer(completion)[:1000]))
    fits = re.fullmatch(r"[0-4]{16}", answer) is not None and keeps_clues(puzzle, answer)
    return answer if fits else None


class Sudoku(Benchmark):
    """4x4 Sudoku puzzles with exactly one solution, generated or those of ``data``.

    Generated puzzles are split by solution: no grid of one split appears in another. An example holds ``puzzle`` and
    ``solution``.

    The score component ``cells`` is the share of the blank cells that equal the solution. It is the whole reward unless
    weights say otherwise. ``solved`` is 1 for a completely right grid. With rewards ``published`` the digits of the
    last closed <answer> are read, without which all is 0, and a puzzle without blanks is 0 as well. With ``verified``
    an answer counts only if it is 16 digits that keep the clues. A ``check`` adds its own ``correct_cells`` (share
    of the blanks) and ``correct`` (all of them), neither of them part of the reward.

    Args:
        data: examples by split, instead of generated ones.
        blanks: least and most blank cells, both between 1 and 12. No 4x4 grid is determined by fewer than four clues.
        sizes: number of different puzzles per split.
        seed: of the split and the puzzles.
        options: of `Benchmark`. ``rewards`` choose the reading of the answer for ``cells`` and ``solved``. Under
            ``check: published`` the accuracy is ``correct_cells``, which is the published number. Without a check it is
            ``solved``.

    Raises:
        ValueError: as of `Benchmark`. Also blanks outside that range, an unknown or empty split, and when asked for,
            more puzzles than exist.

    Example:
        >>> from dmpo_lightning import Sudoku
        >>> example = {"puzzle": "1234341221430000", "solution": "1234341221434321"}
        >>> Sudoku().score(example, "<answer>1234341221434322</answer>")
        {'cells': 0.75, 'solved': 0.0}
    """

    # The published reward. `solved` is for the log, or for weights of one's own.
    reward_weights = {"cells": 1.0}
    columns = ("Puzzle", "Solution")
    fields = ("puzzle",)
    unchecked_accuracy = "solved"
    instructions = {"train": INSTRUCTION, "eval": INSTRUCTION}

    def __init__(
        self,
        data: Mapping[str, Sequence[Example]] | None = None,
        *,
        blanks: tuple[int, int] = (8, 12),
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(data, **options)
        if not 1 <= blanks[0] <= blanks[1] <= 12:
            raise ValueError(f"`blanks` must be two counts with 1 <= least <= most <= 12, got {blanks}.")
        self.blanks, self.seed = blanks, seed
        self.sizes = {"train": 4096, "validation": 512, "test": 1024} | check_sizes(sizes)
        self.is_generated = data is None
        if self.check_name == "published":
            self.accuracy = "correct_cells"

    @cached_property
    def grids(self) -> dict[str, list[str]]:
        """The complete grids of each split."""
        # From the seed alone and not from `sizes`: a split that is made larger begins with the same puzzles.
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
        check_choice("split", split, get_args(Split))
        generator = random.Random(f"{self.seed}-{split}")
        puzzles: dict[str, str] = {}
        # Bounded, because candidates come again and again once all puzzles have been found.
        for _ in range(100 * self.sizes[split] + 2):
            solution, blanks = generator.choice(self.grids[split]), generator.randint(*self.blanks)
            puzzle = blank_out(solution, blanks, generator)
            while len(solutions(puzzle)) != 1:
                puzzle = blank_out(solution, blanks, generator)
            puzzles[puzzle] = solution
            if len(puzzles) == self.sizes[split]:
                return [{"puzzle": puzzle, "solution": solution} for puzzle, solution in puzzles.items()]
        raise ValueError(
            f"Found only {len(puzzles)} different {split} puzzles with {self.blanks[0]}-{self.blanks[1]} blanks, but "
            f"`sizes` asks for {self.sizes[split]}; ask for fewer or widen `blanks`."
        )

    def difficulty(self, example: Example) -> str:
        return f"{example['puzzle'].count('0')} blanks"

    def show(self, example: Example, completion: str | None) -> str:
        """The grid, with a point for each cell without a digit."""
        digits = example["puzzle"] if completion is None else published_answer(completion)[:CELLS]
        cells = [digit if digit in "1234" else "." for digit in digits.ljust(CELLS, "0")]
        rows = [f"{a} {b} | {c} {d}" for a, b, c, d in zip(*[iter(cells)] * 4, strict=True)]
        return "\n".join([*rows[:2], "----+----", *rows[2:]])

    def task_text(self, example: Example) -> str:
        return f"Solve the following Sudoku puzzle: {example['puzzle']}\n"

    def published_components(self, example: Example, completion: str) -> dict[str, float]:
        return _cell_components(_published(example, first_digits(last_block(completion) or "")))

    def verified_components(self, completion: str, verdict: Verdict) -> dict[str, float]:
        return _cell_components(verdict)

    def published_check(self, example: Example, completion: str) -> Verdict:
        """As d1 evaluates: what it finds is padded or cut to 16 cells."""
        return _published(example, published_answer(completion))

    def verified_check(self, example: Example, completion: str) -> Verdict:
        """An answer counts only if it is 16 digits that keep the clues."""
        answer = verified_answer(example["puzzle"], completion)
        correct, blanks = correct_cells(example["puzzle"], example["solution"], answer or "")
        return Verdict(answer, answer is not None and correct == blanks, _share(correct, blanks))

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Example:
        """From ``Puzzle`` and ``Solution`` of 16 digits. Raises ValueError if they contradict each other."""
        # Digits that some program took for a number have lost the zeros in front.
        puzzle, solution = (str(row[column]).strip().zfill(CELLS) for column in ("Puzzle", "Solution"))
        if len(puzzle) != CELLS or solution not in sudoku_grids():
            raise ValueError("`Puzzle` must be 16 digits and `Solution` a complete 4x4 grid")
        if not keeps_clues(puzzle, solution):
            raise ValueError("`Solution` contradicts the clues of `Puzzle`")
        return {"puzzle": puzzle, "solution": solution}

    @classmethod
    def from_saved(cls, record: Mapping[str, Any]) -> Example:
        """The puzzle is the 16 digits of ``question``, the solution ``ground_truth``."""
        puzzle = re.search(r"(?<!\d)[0-4]{16}(?!\d)", record["question"])
        if puzzle is None:
            raise ValueError("`question` holds no puzzle of 16 digits")
        return {"puzzle": puzzle.group(), "solution": str(record["ground_truth"])}
