"""Values of short arithmetic expressions: parsed here, never evaluated as code, with bounded work on any text."""

import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

MAX_DEPTH = 200
"""Nested parentheses. Python's own parser refuses more."""
MAX_BITS = 1 << 16
"""Of an integer power. ``99**98**97`` is refused before it is computed."""
MAX_LENGTH = 20_000
"""Characters of an expression."""
MAX_DIGITS = 4300
"""Of one integer, as in Python."""

Number = int | float | complex
_NUMBER = re.compile(r"[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+")
_OPERATOR = re.compile(r"\*\*|//|[-+*/()]")


class ExpressionError(ValueError):
    """A text that is no expression, or one without a value."""


def integers(text: str) -> list[int]:
    """Every run of digits, in order.

    Raises:
        ExpressionError: a text that is too long for an expression, or an integer that Python would not convert either.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"more than {MAX_LENGTH} characters")
    runs = re.findall(r"\d+", text)
    if any(len(run) > MAX_DIGITS for run in runs):
        raise ExpressionError(f"an integer of more than {MAX_DIGITS} digits")
    return [int(run) for run in runs]


def operands(text: str) -> list[tuple[int, bool]]:
    """Every whole number of an expression, in order, and whether it has a minus sign of its own (``2 * -3``).

    Raises:
        ExpressionError: a text that is no sequence of numbers, operators and parentheses.
    """
    tokens = ["(", *_tokens(text)]
    found = []
    for place, token in enumerate(tokens):
        if token.isdecimal():
            # Behind a number or a closing parenthesis a minus is a difference.
            is_sign = tokens[place - 1] == "-" and not (tokens[place - 2].isdecimal() or tokens[place - 2] == ")")
            found.append((int(_exact_number(token)), is_sign))
    return found


def python_value(text: str) -> Number:
    """The value that Python gives an expression of numbers, ``+ - * / // **`` and parentheses.

    Integers stay exact, ``/`` makes floats, and a root of a negative number is complex.

    Raises:
        ExpressionError: no such expression, a division by zero, an overflow, or a power of more than `MAX_BITS` bits.
    """
    try:
        return _value(_python_tokens(text), _python_number, _PYTHON)
    # Complex numbers have no //, and floats overflow.
    except (ArithmeticError, TypeError) as error:
        raise ExpressionError(str(error)) from None


def exact_value(text: str) -> Fraction:
    """The exact value of an expression of numbers, ``+ - * /`` and parentheses.

    Raises:
        ExpressionError: no such expression, or a division by zero.
    """
    try:
        return _value(_tokens(text), _exact_number, _EXACT)
    except ZeroDivisionError:
        raise ExpressionError("division by zero") from None


def _python_tokens(text: str) -> list[str]:
    """The tokens of a text that Python would read as one expression."""
    # The published code evaluates the text, so what Python refuses must be refused here: outside parentheses an
    # expression stands on one line, which may be indented only if it is the very first.
    body = text.lstrip(" \t").replace("\r\n", "\n").replace("\r", "\n")
    body = re.sub(r"\A(?:[ \t\f]*\n)+", "", body)
    last_line = body.rpartition("\n")
    if re.match(r"[ \t\f]*[ \t]", body) or (last_line[1] and last_line[2] and not last_line[2].strip(" \t")):
        raise ExpressionError("unexpected indent")
    body = body.rstrip(" \t\f\n")
    depth = 0
    for character in body:
        depth += (character == "(") - (character == ")")
        if character == "\n" and depth == 0:
            raise ExpressionError("an expression ends with its line")
    return _tokens(body)


def _tokens(text: str) -> list[str]:
    tokens, place = [], 0
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"more than {MAX_LENGTH} characters")
    while place < len(text):
        if text[place] in " \t\f\n":
            place += 1
            continue
        match = _NUMBER.match(text, place) or _OPERATOR.match(text, place)
        if match is None:
            raise ExpressionError(f"unexpected {text[place]!r}")
        tokens.append(match.group())
        place = match.end()
    return tokens


def _python_number(token: str) -> Number:
    if "." in token:
        return float(token)
    # Python refuses 007, but takes 000.
    if len(token) > MAX_DIGITS or (token[0] == "0" and token.strip("0")):
        raise ExpressionError(f"Python takes no integer {token[:20]}")
    return int(token)


def _exact_number(token: str) -> Fraction:
    if len(token) > MAX_DIGITS:
        raise ExpressionError(f"a number of more than {MAX_DIGITS} digits")
    return Fraction(f"0{token}" if token[0] == "." else token.rstrip("."))


def _power(base: Number, exponent: Number) -> Number:
    whole = isinstance(base, int) and isinstance(exponent, int) and exponent > 0 and abs(base) > 1
    # The bound is asked before the power is computed, which for 99**98**97 would not end.
    if whole and abs(int(base.real)).bit_length() * int(exponent.real) > MAX_BITS:
        raise ExpressionError(f"a power of more than {MAX_BITS} bits")
    result: Number = base**exponent
    return result


_Value = int | float | complex | Fraction
_Operators = dict[str, Callable[[Any, Any], Any]]
_EXACT: _Operators = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_PYTHON: _Operators = {**_EXACT, "//": operator.floordiv, "**": _power}
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "sign": 3, "**": 4}


def _value(tokens: list[str], number: Callable[[str], _Value], operators: _Operators) -> Any:
    """The value by Dijkstra's shunting yard with Python's precedence.

    Its stack is a list, so that nested parentheses of a hostile text cost no recursion.
    """
    values: list[Any] = []
    waiting: list[tuple[str, bool]] = []
    wants_operand, depth = True, 0

    def reduce_above(precedence: int) -> None:
        while waiting and _PRECEDENCE[waiting[-1][0]] >= precedence:
            symbol, negative = waiting.pop()
            right = values.pop()
            if symbol == "sign":
                values.append(-right if negative else right)
            else:
                values.append(operators[symbol](values.pop(), right))

    for token in tokens:
        if token == "(" and wants_operand:
            depth += 1
            waiting.append(("(", False))
        elif token in ("+", "-") and wants_operand:
            waiting.append(("sign", token == "-"))
        elif wants_operand:
            values.append(_operand(token, number))
            wants_operand = False
        elif token == ")":
            reduce_above(1)
            depth -= 1
            if not waiting:
                raise ExpressionError("a parenthesis was never opened")
            waiting.pop()
        elif token in operators:
            # ** alone groups from the right: 2**3**2 is 2**9.
            reduce_above(_PRECEDENCE[token] + (token == "**"))
            waiting.append((token, False))
            wants_operand = True
        else:
            raise ExpressionError(f"unexpected {token!r}")
        if depth > MAX_DEPTH:
            raise ExpressionError(f"more than {MAX_DEPTH} nested parentheses")
    if wants_operand or depth:
        raise ExpressionError("the expression is not complete")
    reduce_above(1)
    return values.pop()


def _operand(token: str, number: Callable[[str], _Value]) -> _Value:
    if token in _PRECEDENCE or token == ")":
        raise ExpressionError("a number is missing")
    return number(token)
