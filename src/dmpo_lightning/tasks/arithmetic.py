"""Values of short arithmetic expressions: read by Python's own parser, never evaluated as code, with bounded work.

The parser makes a tree of a text and runs nothing. What is no number or none of a few operators in that tree has no
value here.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

MAX_LENGTH = 1000
"""Characters of an expression."""
MAX_BITS = 1 << 16
"""Of an integer power. ``99**98**97`` is refused before it is computed."""

Number = int | float | complex
_EXPRESSION = re.compile(r"[0-9+\-*/(). \t\f\r\n]*")
# Behind a number or a closing parenthesis a minus is a difference.
_SIGN = re.compile(r"(?:^|[-+*/(])\s*-\s*$")
_LEADING_ZEROS = re.compile(r"(?<![0-9.])0+(?=[0-9])")


class ExpressionError(ValueError):
    """A text that is no expression, or one without a value."""


def integers(text: str) -> list[int]:
    """Every run of digits, in order.

    Raises:
        ExpressionError: a text that is too long for an expression.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"more than {MAX_LENGTH} characters")
    return [int(run) for run in re.findall(r"\d+", text)]


def python_value(text: str) -> Number:
    """The value that Python gives an expression of numbers, ``+ - * / // **`` and parentheses.

    Integers stay exact, ``/`` makes floats, and a root of a negative number is complex.

    Raises:
        ExpressionError: no such expression, a division by zero, an overflow, or a power of more than `MAX_BITS` bits.
    """
    # As `eval` does it, a text may be indented.
    tree = _tree(text.lstrip(" \t"))
    try:
        value: Number = _value(tree, _PYTHON, lambda constant: constant.value)
    # Complex numbers have no //, and floats overflow.
    except (ArithmeticError, TypeError) as error:
        raise ExpressionError(str(error)) from None
    return value


def exact_value(text: str) -> Fraction:
    """The exact value of an expression of numbers, ``+ - * /`` and parentheses.

    Raises:
        ExpressionError: no such expression, or a division by zero.
    """
    text = _on_one_line(text)

    def exact(constant: ast.Constant) -> Fraction:
        # Of the digits as they were written: the parser has rounded 0.1 to a binary number.
        return Fraction("0" + text[constant.col_offset : constant.end_col_offset].rstrip("."))

    try:
        return Fraction(_value(_tree(text), _EXACT, exact))
    except ZeroDivisionError:
        raise ExpressionError("division by zero") from None


def operands(text: str) -> list[tuple[int, bool]]:
    """Every whole number of an expression, and whether it has a minus sign of its own (``2 * -3``, not ``-(3)``).

    Raises:
        ExpressionError: no expression of numbers, operators and parentheses.
    """
    text = _on_one_line(text)
    numbers = [node for node in ast.walk(_tree(text)) if isinstance(node, ast.Constant) and isinstance(node.value, int)]
    return [
        (int(text[node.col_offset : node.end_col_offset]), _SIGN.search(text, 0, node.col_offset) is not None)
        for node in numbers
    ]


def _on_one_line(text: str) -> str:
    """The expression as Python takes it: of any number of lines, and with zeros in front of numbers."""
    return _LEADING_ZEROS.sub("", " ".join(text.split()))


def _tree(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH or not _EXPRESSION.fullmatch(text):
        raise ExpressionError(f"more than {MAX_LENGTH} characters, or other characters than those of arithmetic")
    try:
        return ast.parse(text, mode="eval").body
    # Python says in all these ways that it does not read a text: deep nesting is too much for memory or recursion.
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ExpressionError(str(error)) from None


def _power(base: Number, exponent: Number) -> Number:
    whole = isinstance(base, int) and isinstance(exponent, int) and exponent > 0 and abs(base) > 1
    # The bound is asked before the power is computed, which for 99**98**97 would not end.
    if whole and abs(int(base.real)).bit_length() * int(exponent.real) > MAX_BITS:
        raise ExpressionError(f"a power of more than {MAX_BITS} bits")
    result: Number = base**exponent
    return result


_Operators = dict[type[ast.AST], Callable[..., Any]]
_EXACT: _Operators = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_PYTHON: _Operators = {**_EXACT, ast.FloorDiv: operator.floordiv, ast.Pow: _power}


def _value(node: ast.expr, operators: _Operators, number: Callable[[ast.Constant], Any]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return number(node)
    if isinstance(node, ast.BinOp) and type(node.op) in operators:
        return operators[type(node.op)](_value(node.left, operators, number), _value(node.right, operators, number))
    if isinstance(node, ast.UnaryOp) and type(node.op) in operators:
        return operators[type(node.op)](_value(node.operand, operators, number))
    raise ExpressionError(f"{type(node).__name__} is no arithmetic")
