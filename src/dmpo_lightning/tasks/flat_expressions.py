"""Arithmetic expressions without brackets whose every part is a whole number that is not negative."""

import random
from collections.abc import Sequence

OPERATORS = "+-*/"


def random_expression(numbers: Sequence[int], generator: random.Random) -> tuple[str, int]:
    """An expression of all numbers in their order, and its value.

    Operators are drawn until every quotient is exact and no partial sum is below zero. Sums and products always are,
    so that this ends.

    Args:
        numbers: at least one, none of them negative.
        generator: of the draws.
    """
    while True:
        chosen = generator.choices(OPERATORS, k=len(numbers) - 1)
        value = _value(numbers, chosen)
        if value is not None:
            rest = zip(chosen, numbers[1:], strict=True)
            return str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in rest), value


def _value(numbers: Sequence[int], operators: Sequence[str]) -> int | None:
    """The value with the usual precedence, or None where a part is negative or no whole number."""
    total, sign, term = 0, 1, numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            term *= number
        elif operator == "/":
            if number == 0 or term % number:
                return None
            term //= number
        else:
            total += sign * term
            if total < 0:
                return None
            sign, term = (1 if operator == "+" else -1), number
    total += sign * term
    return total if total >= 0 else None
