"""Random Countdown puzzles that have a solution, because each target is the value of a random expression."""

import operator
import random
from collections.abc import Collection, Sequence
from fractions import Fraction

from dmpo_lightning.tasks.base import Example

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
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


def random_expression(numbers: Sequence[int], generator: random.Random) -> tuple[str, int]:
    """An expression of all numbers in their order, without brackets, and its value.

    Each of its parts is a whole number that is not negative.

    Operators are drawn until every quotient is exact and no partial sum is below zero. Sums and products always are,
    so that this ends.

    Args:
        numbers: at least one, none of them negative.
        generator: of the draws.
    """
    while True:
        chosen = generator.choices("+-*/", k=len(numbers) - 1)
        value = _flat_value(numbers, chosen)
        if value is not None:
            rest = zip(chosen, numbers[1:], strict=True)
            return str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in rest), value


def _flat_value(numbers: Sequence[int], operators: Sequence[str]) -> int | None:
    """The value with the usual precedence, or None where a part is negative or no whole number."""
    total, sign, term = 0, 1, numbers[0]
    for symbol, number in zip(operators, numbers[1:], strict=True):
        if symbol == "*":
            term *= number
        elif symbol == "/":
            if number == 0 or term % number:
                return None
            term //= number
        else:
            total += sign * term
            if total < 0:
                return None
            sign, term = (1 if symbol == "+" else -1), number
    total += sign * term
    return total if total >= 0 else None
