"""Countdown puzzles: which targets can be reached, and random puzzles that have a solution."""

import operator
import random
from collections import Counter
from collections.abc import Collection, Sequence
from fractions import Fraction
from functools import cache
from itertools import chain

from dmpo_lightning.tasks.base import Example
from dmpo_lightning.tasks.flat_expressions import random_expression

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


# Remembered, because the same few numbers are parts of many cuts.
@cache
def reachable(numbers: tuple[int, ...]) -> frozenset[Fraction]:
    """Every value of an expression with all of the sorted numbers once each. For six numbers this takes seconds."""
    if len(numbers) == 1:
        return frozenset([Fraction(numbers[0])])
    values: set[Fraction] = set()
    for left, right in _parts(numbers):
        for a in reachable(left):
            for b in reachable(right):
                # Both differences and both quotients, because `_parts` names each cut once.
                values.update((a + b, a - b, b - a, a * b))
                values.update(chain((a / b,) if b else (), (b / a,) if a else ()))
    return frozenset(values)


def _parts(numbers: tuple[int, ...]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The ways to cut a sorted tuple in two. The first number stays left."""
    rest = numbers[1:]
    # One less than all subsets: with the whole rest on the left there would be nothing on the right.
    cuts = [[rest[i] for i in range(len(rest)) if mask >> i & 1] for mask in range(2 ** len(rest) - 1)]
    return {((numbers[0], *left), tuple((Counter(rest) - Counter(left)).elements())) for left in cuts}


def solvable(example: Example) -> bool:
    """Whether the target can be reached. This is a search, meant for up to five numbers."""
    return Fraction(example["target"]) in reachable(tuple(sorted(example["numbers"])))


PARTS = 10
"""Largest part of a generated expression, as a multiple of the largest number."""


def generate(
    size: int,
    *,
    count: tuple[int, int],
    largest: int,
    seed: str,
    excluded: Collection[str] = (),
    largest_target: int | None = None,
    brackets: bool = True,
) -> list[Example]:
    """Different puzzles that have a solution, because each target is the value of a random expression.

    Args:
        size: number of puzzles.
        count: least and most numbers of a puzzle.
        largest: number. The least is 1.
        seed: of all of it.
        excluded: keys (`puzzle_key`) that must not come.
        largest_target: of a puzzle, and the least is 1. None is the largest number.
        brackets: whether a puzzle may need some. Without, it is solved by an expression that has none, and of which
            every part is a whole number that is not negative, with the numbers in their order.

    Raises:
        ValueError: fewer puzzles exist, as far as 200 attempts for each can tell.
    """
    generator = random.Random(seed)
    puzzles: dict[str, Example] = {}
    # Bounded, because there may not be as many puzzles.
    for _ in range(200 * size):
        if len(puzzles) == size:
            break
        numbers = [generator.randint(1, largest) for _ in range(generator.randint(*count))]
        value = (
            _random_value(numbers, generator, PARTS * largest)
            if brackets
            else Fraction(random_expression(numbers, generator)[1])
        )
        if value is not None and 1 <= value <= (largest_target or largest):
            example = {"numbers": numbers, "target": int(value)}
            key = puzzle_key(example)
            if key not in excluded:
                puzzles.setdefault(key, example)
    if len(puzzles) < size:
        raise ValueError(
            f"Found only {len(puzzles)} of {size} Countdown puzzles; ask for fewer by `sizes`, or widen `count`, "
            "`largest` or `largest_target`."
        )
    return list(puzzles.values())


def _random_value(numbers: Sequence[int], generator: random.Random, bound: int) -> Fraction | None:
    """The value of a random expression of all numbers, whose parts are whole and within the bound.

    None where no operation on two parts keeps to that.
    """
    values = [Fraction(number) for number in numbers]
    while len(values) > 1:
        generator.shuffle(values)
        right, left = values.pop(), values.pop()
        # Sums and differences stand in twice, so that they are tried first twice as often as products and quotients.
        results = (
            _OPERATIONS[symbol](left, right) for symbol in generator.sample("++--*/", 6) if symbol != "/" or right
        )
        kept = next((value for value in results if value.denominator == 1 and abs(value) <= bound), None)
        if kept is None:
            return None
        values.append(kept)
    return values[0]


def puzzle_key(example: Example) -> str:
    """The same for puzzles that differ in the order of their numbers only."""
    return f"{sorted(example['numbers'])} {example['target']}"
