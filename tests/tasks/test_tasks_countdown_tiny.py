"""Countdown without brackets: its expressions, its splits, and the demonstrations of the embedded base."""

import random
import re
from functools import cache
from itertools import permutations, product

import pytest

from dmpo_lightning import Countdown, CountdownDataModule, CountdownDemonstrations
from dmpo_lightning.tasks.countdown_puzzles import puzzle_key, random_expression

SPLITS = ("train", "validation", "test")
SIZES = {"train": 640, "validation": 256, "test": 512}
TEMPLATE = "{numbers}={target}"


def value(expression: str) -> float:
    """By Python itself. Only for expressions that this file or the generator wrote."""
    assert re.fullmatch(r"[0-9]+([-+*/][0-9]+)*", expression)
    return eval(expression)  # noqa: S307  see above


def canonical(expression: str) -> str:
    """The same for expressions that differ in the order of their terms, or of the factors and divisors of a term."""
    terms = re.findall(r"(^|[+-])([0-9]+(?:[*/][0-9]+)*)", expression)
    return " ".join(
        sorted((sign or "+") + "".join(sorted(re.findall(r"[*/][0-9]+", "*" + term))) for sign, term in terms)
    )


@cache
def expressions_by_value(numbers: tuple[int, ...]) -> dict[float, set[str]]:
    """Every canonical expression without brackets of three numbers, by trying them all."""
    found: dict[float, set[str]] = {}
    for (a, b, c), first, second in product(set(permutations(numbers)), "+-*/", "+-*/"):
        expression = f"{a}{first}{b}{second}{c}"
        found.setdefault(value(expression), set()).add(canonical(expression))
    return found


def solutions(example) -> set[str]:
    return expressions_by_value(tuple(sorted(example["numbers"]))).get(example["target"], set())


def puzzles(**options):
    return CountdownDataModule(
        source="generated", largest=9, largest_target=99, brackets=False, sizes=SIZES, **options
    ).task


def test_parts_of_a_random_expression_are_whole_and_never_negative():
    generator = random.Random(0)
    drawn = [random_expression([2, 6, 7], generator) for _ in range(2000)]
    assert {text: value(text) for text, _ in drawn} == dict(drawn)
    # 2-6+7 passes below zero and 2/6*7 through a fraction; 6/7 is none.
    assert dict(drawn).keys() == {"2+6+7", "2+6-7", "2+6*7", "2*6+7", "2*6-7", "2*6*7"}
    assert "8/2-4" in dict(random_expression([8, 2, 4], generator) for _ in range(200))


def test_splits_share_neither_a_puzzle_nor_a_solution():
    task = puzzles()
    examples = {split: task.examples(split) for split in SPLITS}
    keys = {split: {puzzle_key(example) for example in examples[split]} for split in SPLITS}
    solved = {split: set().union(*map(solutions, examples[split])) for split in SPLITS}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not keys[first] & keys[second]
        assert not solved[first] & solved[second]
    assert {split: len(keys[split]) for split in SPLITS} == SIZES
    # Without brackets, each has a solution.
    assert all(solutions(example) for split in SPLITS for example in examples[split])
    assert all(1 <= e["target"] <= 99 and max(e["numbers"]) <= 9 for split in SPLITS for e in examples[split])


def test_no_demonstration_has_a_puzzle_that_is_held_out_or_a_solution_of_one():
    held_out = [example for split in ("validation", "test") for example in puzzles().examples(split)]
    solved = set().union(*map(solutions, held_out))
    shown = CountdownDemonstrations(size=4000, held_out=SIZES)
    rows = [row for split in SPLITS for row in shown.examples(split)]
    assert not set(map(puzzle_key, rows)) & set(map(puzzle_key, held_out))
    right = [row for row in rows if shown.score(row, row["completion"])["right"]]
    assert not {canonical(row["completion"][8:-9]) for row in right} & solved
    # Without the same seed they would be among them.
    other = CountdownDemonstrations(size=4000, held_out=SIZES, seed=1).examples("train")
    assert set(map(puzzle_key, other)) & set(map(puzzle_key, held_out))


@pytest.mark.parametrize("sums", [0.0, 0.7, 1.0])
def test_demonstrations_are_valid_and_add_up_as_often_as_is_said(sums):
    rows = CountdownDemonstrations(size=2000, sums=sums).examples("train")
    assert all(CountdownDemonstrations().score(row, row["completion"])["valid"] for row in rows)
    right = [CountdownDemonstrations().score(row, row["completion"])["right"] == 1 for row in rows]
    lazy = [row["completion"] == f"<answer>{'+'.join(map(str, row['numbers']))}</answer>" for row in rows]
    assert all(answer or hits for answer, hits in zip(lazy, right, strict=True))
    # Some puzzles are solved by the sum.
    assert sums <= sum(lazy) / 2000 + 0.03 <= sums + 0.12 * (1 - sums) + 0.06


@pytest.mark.parametrize(
    ("completion", "valid", "right"),
    [
        ("<answer>7-3*2</answer>", 1.0, 1.0),
        ("<answer>7-3-2</answer>", 1.0, 0.0),
        ("<answer>3-2</answer>", 0.0, 0.0),
        ("<answer>7-3*2", 1.0, 1.0),
        ("<answer>7-*3*2</answer>", 0.0, 0.0),
        ("<answer>7/0</answer>", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_an_answer_is_valid_that_uses_the_numbers_once_each(completion, valid, right):
    example = {"numbers": [2, 3, 7], "target": 1}
    assert CountdownDemonstrations().score(example, completion) == {"valid": valid, "right": right}


def test_a_share_above_one_is_an_error():
    with pytest.raises(ValueError, match=r"`sums` must be in \[0, 1\], got 1.5"):
        CountdownDemonstrations(sums=1.5)


def test_the_prompt_is_the_puzzle_inside_the_template():
    example = {"numbers": [2, 11, 7], "target": 29}
    assert puzzles(prompt_template=TEMPLATE).prompt(example) == "2 11 7=29"
    assert CountdownDemonstrations().prompt(example) == "2 11 7=29"
    task = Countdown(prompt_template="{target} of {numbers}, in \\boxed{}{x}")
    assert task.prompt(example) == "29 of 2 11 7, in \\boxed{}{x}"
    assert (task.facts()["instruction"], "prompt template" in Countdown().facts()) == (None, False)


def test_a_template_without_its_places_or_beside_an_instruction_is_an_error():
    with pytest.raises(ValueError, match=r"must contain \{numbers\} and \{target\}"):
        Countdown(prompt_template="{numbers}")
    with pytest.raises(ValueError, match="`prompt_template` is the whole of the user's turn"):
        Countdown(prompt_template=TEMPLATE, instruction="Solve:")
