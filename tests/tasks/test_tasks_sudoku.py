import csv
import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpo_lightning import LatinSquareDemonstrations, Sudoku
from dmpo_lightning.tasks.sudoku import (
    HELD_OUT_GRIDS,
    blank_out,
    correct_cells,
    latin_squares,
    solutions,
    sudoku_grids,
)

SPLITS = ("train", "validation", "test")
SMALL = {"train": 60, "validation": 20, "test": 40}
GRID = "1234341221434321"
PUZZLE = "1000040000400020"


def brute_force(puzzle: str) -> list[str]:
    """All solutions by trying digits cell by cell; shares nothing with the package."""
    if "0" not in puzzle:
        return [puzzle]
    cell = puzzle.index("0")
    row, column = divmod(cell, 4)
    taken = {
        puzzle[4 * r + c]
        for r, c in product(range(4), range(4))
        if r == row or c == column or (r // 2 == row // 2 and c // 2 == column // 2)
    }
    return [
        solution
        for digit in "1234"
        if digit not in taken
        for solution in brute_force(puzzle[:cell] + digit + puzzle[cell + 1 :])
    ]


# Grids ----------------------------------------------------------------------------------------------------------------


def test_there_are_576_latin_squares_of_order_4():
    assert len(set(latin_squares())) == len(latin_squares()) == 576
    for square in latin_squares():
        rows, columns = [square[4 * i : 4 * i + 4] for i in range(4)], [square[i::4] for i in range(4)]
        assert all(sorted(line) == list("1234") for line in rows + columns)


def test_there_are_288_sudoku_grids_and_they_solve_the_empty_puzzle():
    assert len(sudoku_grids()) == 288
    assert sorted(sudoku_grids()) == sorted(brute_force("0" * 16)) == sorted(solutions("0" * 16))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 287), st.integers(0, 16), st.randoms(use_true_random=False))
def test_solutions_are_those_of_brute_force(index, blanks, generator):
    puzzle = blank_out(sudoku_grids()[index], blanks, generator)
    found = brute_force(puzzle)
    assert puzzle.count("0") == blanks
    assert sorted(solutions(puzzle)) == sorted(found)
    assert (len(solutions(puzzle)) == 1) == (len(found) == 1)


def test_contradictory_clues_have_no_solution():
    assert solutions("11" + "0" * 14) == []


# The puzzles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("blanks", [(4, 9), (11, 12)])
def test_puzzles_have_exactly_one_solution_and_blanks_in_range(split, blanks):
    examples = Sudoku(blanks=blanks, sizes=SMALL).examples(split)
    assert len(examples) == len({example["puzzle"] for example in examples}) == SMALL[split]
    assert {example["puzzle"].count("0") for example in examples} == set(range(blanks[0], blanks[1] + 1))
    for example in examples:
        assert brute_force(example["puzzle"]) == [example["solution"]]


def test_no_grid_of_one_split_appears_in_another():
    task = Sudoku(sizes=SMALL)
    grids = {split: set(task.grids[split]) for split in SPLITS}
    assert {split: len(grids[split]) for split in SPLITS} == {"train": 216, **HELD_OUT_GRIDS}
    assert len(grids["train"] | grids["validation"] | grids["test"]) == 288
    for split in SPLITS:
        assert {example["solution"] for example in task.examples(split)} <= grids[split]


def test_puzzles_depend_on_the_seed_alone():
    random.seed(1)
    first = Sudoku(sizes=SMALL, seed=3).examples("train")
    random.seed(2)
    assert Sudoku(sizes=SMALL, seed=3).examples("train") == first
    assert Sudoku(sizes=SMALL, seed=4).examples("train") != first


def test_more_puzzles_of_a_split_begin_with_the_same_ones():
    few, many = (Sudoku(sizes={"test": size}).examples("test") for size in (10, 30))
    assert many[:10] == few


def test_the_standard_held_out_set_is_as_large_as_promised():
    examples = Sudoku(blanks=(11, 12)).examples("test")
    assert len(examples) == 1024
    assert all(len(solutions(example["puzzle"])) == 1 for example in examples)


@pytest.mark.parametrize("blanks", [(0, 5), (6, 5), (5, 13)])
def test_blanks_outside_the_range_are_an_error(blanks):
    with pytest.raises(ValueError, match="`blanks` must be"):
        Sudoku(blanks=blanks)


@pytest.mark.parametrize("sizes", [{"train": 0}, {"dev": 5}])
def test_an_empty_or_unknown_split_is_an_error(sizes):
    with pytest.raises(ValueError, match="`sizes` must map"):
        Sudoku(sizes=sizes)


def test_more_puzzles_than_exist_are_an_error_that_counts_them():
    """One blank in each of 16 cells of the 24 validation grids makes 384 puzzles."""
    task = Sudoku(blanks=(1, 1), sizes={"validation": 400})
    with pytest.raises(ValueError, match="Found only 384 different validation puzzles with 1-1 blanks"):
        task.examples("validation")


# Prompts --------------------------------------------------------------------------------------------------------------


def test_the_prompt_is_the_puzzle_inside_the_template():
    example = {"puzzle": PUZZLE, "solution": GRID}
    assert Sudoku(prompt_template="{puzzle}").prompt(example) == PUZZLE
    assert Sudoku(prompt_template="Solve {puzzle}.").prompt(example) == f"Solve {PUZZLE}."


def test_other_braces_in_the_template_stay():
    task = Sudoku(prompt_template="Put the answer in \\boxed{}: {puzzle} {x}")
    assert task.prompt({"puzzle": PUZZLE}) == f"Put the answer in \\boxed{{}}: {PUZZLE} {{x}}"


def test_a_template_without_the_puzzle_is_an_error():
    with pytest.raises(ValueError, match=r"must contain \{puzzle\}"):
        Sudoku(prompt_template="Solve it.")


def test_a_template_beside_an_instruction_is_an_error():
    with pytest.raises(ValueError, match="`prompt_template` is the whole of the user's turn"):
        Sudoku(prompt_template="{puzzle}", instruction="Solve:")


# Scores ---------------------------------------------------------------------------------------------------------------

BLANKS = 12


def score(completion: str) -> tuple[float, float]:
    values = Sudoku(rewards="published", check=None).score({"puzzle": PUZZLE, "solution": GRID}, completion)
    assert set(values) == {"cells", "solved"}
    return round(values["cells"] * BLANKS, 9), values["solved"]


@pytest.mark.parametrize(
    ("completion", "cells", "solved"),
    [
        (f"<answer>{GRID}</answer>", BLANKS, 1),
        (f"<reasoning>hm</reasoning>\n<answer>\n{GRID}\n</answer>\n", BLANKS, 1),
        ("<answer>1234 3412 2143 4321</answer>", BLANKS, 1),
        (f"<answer>{GRID}99999</answer>", BLANKS, 1),
        (f"{GRID}", 0, 0),
        (f"<answer>{GRID}", 0, 0),
        (f"<answer>1234</answer><answer>{GRID}", 3, 0),
        (f"<answer>1<answer>{GRID}</answer>", 1, 0),
        (f"<answer>1</answer><answer>{GRID}</answer>", BLANKS, 1),
        (f"<answer>{GRID}</answer><answer></answer>", 0, 0),
        (f"<answer>{PUZZLE}</answer>", 0, 0),
        ("<answer>1234</answer>", 3, 0),
        ("<answer>1214341221434321</answer>", BLANKS - 1, 0),
        ("<answer>4234341221434321</answer>", BLANKS, 1),
        (f"<answer>5{GRID}</answer>", 1, 0),
        ("", 0, 0),
        ("no digits", 0, 0),
    ],
    ids=[
        "right",
        "with reasoning and newlines",
        "with blanks between rows",
        "too long is cut",
        "no tags",
        "no closing tag",
        "the last closed answer counts",
        "an answer begins at its first tag",
        "the last answer counts",
        "an empty last answer",
        "the puzzle itself",
        "too short is padded",
        "one cell wrong",
        "a clue overwritten does not count",
        "shifted by one",
        "empty",
        "no digits",
    ],
)
def test_scores_worked_out_by_hand(completion, cells, solved):
    assert score(completion) == (cells, solved)


def test_published_digits_are_those_of_isdigit():
    arabic = GRID.translate({ord(digit): chr(0x660 + int(digit)) for digit in "1234"})
    assert score(f"<answer>{arabic}</answer>") == (0, 0)
    # Two more cells in front, so that those of the grid are two too late. Three blanks hold the same digit even so.
    assert score(f"<answer>²³{GRID}</answer>") == (3, 0)
    assert score(f"<answer>½{GRID}</answer>") == (BLANKS, 1)


@pytest.mark.parametrize(
    ("completion", "cells"),
    [
        ("1243341243212134", 0),
        ("<answer>1243341243212134", 0),
        ("<answer>1<answer></answer>", 1 / 8),
        ("<answer>²1243341243212134</answer>", 0),
        ("<answer>1243341243212134</answer>", 1),
    ],
)
def test_published_rewards_are_those_of_the_published_code(completion, cells):
    """Values that the code of d1 gave."""
    example = {"puzzle": "0200341040200104", "solution": "1243341243212134"}
    task = Sudoku(rewards="published")
    assert task.score(example, completion)["cells"] == cells


def test_a_puzzle_without_blanks_is_worth_nothing_as_published_and_is_solved_by_its_grid_as_verified():
    example = {"puzzle": GRID, "solution": GRID}
    published, verified = (Sudoku(rewards=kind, check=kind) for kind in ("published", "verified"))
    grid = f"<answer>{GRID}</answer>"
    for task, text, value in ((published, grid, 0), (verified, grid, 1), (verified, "no", 0)):
        assert task.score(example, text) == {"cells": value, "solved": value}
        assert task.check(example, text).components == {"correct_cells": value, "correct": value}


ROWS = [GRID[row : row + 4] for row in range(0, 16, 4)]


@pytest.mark.parametrize(
    "answer",
    [
        "\n".join("\u00a0".join(row) for row in ROWS),
        f"**{GRID}**",
        f"```\n{GRID}\n```",
        f"```text\n{GRID}\n```",
        "```python\n" + "\n".join(f"[{', '.join(row)}]," for row in ROWS) + "\n```",
        f"`{GRID}`.",
        f'"{GRID}"',
        f"\u201c{GRID}\u201d.",
        "\u250c\u2500\u2510\n" + "\n".join(f"\u2502 {a} {b} \u2502 {c} {d} \u2502" for a, b, c, d in ROWS),
        "|:-:|:-:|:-:|:-:|\n" + "\n".join(f"| {' | '.join(row)} |" for row in ROWS),
        "(" + "), (".join(ROWS) + ")",
        "<br>".join(ROWS),
        "\\text{" + GRID + "}",
        "\\begin{array}{|cc|cc|} \\hline " + " \\\\ ".join(" & ".join(row) for row in ROWS) + " \\end{array}",
        ".\n".join(ROWS) + ".",
    ],
)
def test_what_is_around_the_digits_of_a_grid_is_layout(answer):
    example = {"puzzle": PUZZLE, "solution": GRID}
    for text in (f"<answer>\n{answer}\n</answer>", f"<answer>\\boxed{{{answer}}}</answer>"):
        assert Sudoku().check(example, text).correct


@pytest.mark.parametrize(
    "answer", [GRID + "1", GRID[1:], f"grid {GRID}", "Row 1: " + GRID, f"{GRID[:6]}.{GRID[6:]}", f"{GRID} or {GRID}"]
)
def test_what_is_more_or_less_than_a_grid_is_none(answer):
    assert Sudoku().check({"puzzle": PUZZLE, "solution": GRID}, f"<answer>{answer}</answer>").answer is None


def test_correct_cells_counts_right_blanks_and_all_blanks():
    assert correct_cells(PUZZLE, GRID, GRID) == (12, 12)
    assert correct_cells(PUZZLE, GRID, "1234") == (3, 12)
    assert correct_cells(GRID, GRID, "") == (0, 0)


FRAGMENTS = [
    "<answer>",
    "</answer>",
    "<answer",
    "answer>",
    "<<",
    "1",
    "2",
    "34",
    GRID,
    "0",
    "\n",
    " ",
    "\x00",
    "²",
    "٣",
    "é",
    "{}",
    "%s",
]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join)))
def test_any_text_scores_in_zero_to_one(completion):
    values = Sudoku(rewards="published", check=None).score({"puzzle": PUZZLE, "solution": GRID}, completion)
    assert set(values) == {"cells", "solved"}
    assert 0 <= values["cells"] <= 1
    assert values["solved"] == float(values["cells"] == 1)


# Real puzzles ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published_puzzles(test_data) -> list[dict[str, str]]:
    with (test_data / "sudoku" / "test.csv").open() as file:
        return list(csv.DictReader(file))


def test_published_solutions_are_sudoku_grids_that_agree_with_their_puzzles(published_puzzles):
    assert len(published_puzzles) > 100
    for row in published_puzzles:
        assert row["Solution"] in sudoku_grids()
        assert all(clue in ("0", digit) for clue, digit in zip(row["Puzzle"], row["Solution"], strict=True))
        assert row["Solution"] in solutions(row["Puzzle"])


def test_published_puzzles_are_solved_as_brute_force_does(published_puzzles):
    for row in published_puzzles[::10]:
        found = brute_force(row["Puzzle"])
        assert sorted(solutions(row["Puzzle"])) == sorted(found)
        assert (len(solutions(row["Puzzle"])) == 1) == (len(found) == 1)


def test_published_solutions_score_one_and_published_puzzles_zero(published_puzzles):
    task = Sudoku(rewards="published", check=None)
    for row in published_puzzles:
        example = {"puzzle": row["Puzzle"], "solution": row["Solution"]}
        assert task.score(example, f"<answer>{row['Solution']}</answer>") == {"cells": 1.0, "solved": 1.0}
        assert task.score(example, f"<answer>{row['Puzzle']}</answer>") == {"cells": 0.0, "solved": 0.0}


# Demonstrations of Latin squares --------------------------------------------------------------------------------------


def answer_of(example: dict[str, str]) -> str:
    return example["completion"].removeprefix("<answer>").removesuffix("</answer>")


def test_uncorrupted_demonstrations_complete_their_puzzle_to_a_latin_square():
    task = LatinSquareDemonstrations(size=400, corruption=0.0)
    examples = task.examples("train")
    assert len(examples) == 400
    assert {example["puzzle"].count("0") for example in examples} == set(range(8, 14))
    assert all(answer_of(example) in latin_squares() for example in examples)
    assert all(task.score(example, example["completion"]) == {"latin": 1.0, "clues": 1.0} for example in examples)


def test_half_of_the_demonstrations_break_the_boxes_of_sudoku():
    examples = LatinSquareDemonstrations(size=2000, corruption=0.0).examples("train")
    share = sum(answer_of(example) in sudoku_grids() for example in examples) / 2000
    assert abs(share - 0.5) < 4 * (0.25 / 2000) ** 0.5


def test_corruption_leaves_the_clues_and_makes_three_quarters_of_its_share_wrong():
    clean, noisy = (LatinSquareDemonstrations(size=1000, corruption=c).examples("train") for c in (0.0, 1.0))
    right = [
        digit == other
        for example, square in zip(noisy, clean, strict=True)
        for clue, digit, other in zip(example["puzzle"], answer_of(example), answer_of(square), strict=True)
        if clue == "0"
    ]
    assert abs(sum(right) / len(right) - 0.25) < 4 * (0.1875 / len(right)) ** 0.5
    for example in LatinSquareDemonstrations(size=200, corruption=1.0).examples("train"):
        assert all(clue in ("0", digit) for clue, digit in zip(example["puzzle"], answer_of(example), strict=True))


def test_demonstrations_are_deterministic_and_differ_between_splits():
    task = LatinSquareDemonstrations(size=50)
    assert task.examples("train") == LatinSquareDemonstrations(size=50).examples("train")
    assert len(task.examples("validation")) == 5
    assert task.examples("train")[:5] != task.examples("validation")
    assert len(LatinSquareDemonstrations(size=3).examples("validation")) == 1


@pytest.mark.parametrize(
    ("completion", "latin", "clues"),
    [
        ("<answer>1234214334124321</answer>", 1, 1),
        ("<answer>1234214334124322</answer>", 0, 1),
        ("<answer>2134124334124321</answer>", 0, 0),
        ("<answer>123421433412432</answer>", 0, 0),
        ("", 0, 0),
    ],
    ids=["a latin square", "a repeated digit", "a clue changed", "too short", "empty"],
)
def test_latin_scores_worked_out_by_hand(completion, latin, clues):
    example = {"puzzle": "1000000000000000"}
    assert LatinSquareDemonstrations().score(example, completion) == {"latin": latin, "clues": clues}


def test_a_corruption_above_one_is_an_error():
    with pytest.raises(ValueError, match="`corruption` must be"):
        LatinSquareDemonstrations(corruption=1.5)
