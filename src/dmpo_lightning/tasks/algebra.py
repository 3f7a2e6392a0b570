r"""Exact equality of LaTeX answers by computer algebra, in a worker process that is killed if need be.

math-verify reads LaTeX well, but calls more equal than is: numbers to six decimals, differences that are tiny beside 1,
``2516_7`` and ``2516_8``, a tuple and a set, ``[2]`` and 2. So what an answer consists of is compared here, math-verify
is asked about single expressions without decimals, and what it calls equal is proved.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

# Imported here, and so before the first comparison, of which importing would be a part.
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Eq, Expr, MatrixBase, Number, simplify
from sympy.core.relational import Relational

from dmpo_lightning.tasks import latex
from dmpo_lightning.tasks.numbers import plain
from dmpo_lightning.workers import CallError, TimeLimitError, WorkerPool

logger = logging.getLogger(__name__)

MAX_TEXT = 200
"""Characters of an answer. A longer one is not compared."""
REMEMBERED = 4096
"""Comparisons whose result is kept. Reward and check ask the same, and so do the rollouts of a group."""
_ALLOWED = re.compile(r"[A-Za-z0-9\s\\{}()\[\]^_+\-*/=<>|.,:;!'&~%$]+")
# math-verify drops the base of a number.
_BASE = re.compile(r"[0-9][0-9A-Fa-f]*\)?_")
# It drops words behind numbers, of which these are no units. They are left in a normal form.
_MEANT = re.compile(rf"[0-9](?:[ap]m|{latex.MEANING_WORDS})")
_DECIMAL = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]+)(?![0-9.])")
_DROPPED = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\?[$%]")
_OR = re.compile(r"\\(?:text|mbox|textrm|mathrm)\{\s*(?:or|and),?\s*\}|(?<=\s)(?:or|and)(?=\s)")
_MEMBER = re.compile(r"\A\s*[a-zA-Z]\s*\\in(?![a-z])")
_OPENING, _CLOSING = "([{", ")]}"


class AlgebraicEquality:
    """Whether two short LaTeX answers of plain characters are equal as mathematics.

    Args:
        time_limit: seconds per comparison. One that takes longer is logged and counts as not equal.

    Raises:
        ValueError: a time limit that is not positive.
    """

    def __init__(self, time_limit: float = 2.0) -> None:
        self._pool = WorkerPool(equal, workers=1, time_limit=time_limit)
        self._known: dict[tuple[str, str], bool] = {}

    def __call__(self, gold: str, answer: str) -> bool:
        """False too for an answer that is long, of other characters, or no mathematics that math-verify can read."""
        if max(len(gold), len(answer)) > MAX_TEXT:
            return False
        gold, answer = plain(gold), plain(answer)
        if not (_ALLOWED.fullmatch(gold) and _ALLOWED.fullmatch(answer)):
            return False
        if (gold, answer) not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[gold, answer] = self._compare(gold, answer)
        return self._known[gold, answer]

    def _compare(self, gold: str, answer: str) -> bool:
        (result,) = self._pool.map([(gold, answer)])
        if isinstance(result, CallError):
            late = isinstance(result, TimeLimitError)
            logger.warning("%r was not compared with %r: %s", answer, gold, "time limit" if late else result)
        return result is True


class _Parts(NamedTuple):
    kind: str
    """``[)`` and the like for a tuple or an interval, ``set``, ``list`` without brackets, ``union``, or nothing."""
    parts: Sequence[str]


def equal(gold: str, answer: str) -> bool:
    """Whether two answers are equal: of the same parts, each of which is exactly the other's."""
    whole = latex.normalise(gold), latex.normalise(answer)
    # Commas between thousands are read there.
    texts = [
        normal if latex.rational(normal) is not None else _readable(text)
        for text, normal in zip((gold, answer), whole, strict=True)
    ]
    return _equal(*texts)


def _readable(text: str) -> str:
    """The answer without what neither structure nor mathematics needs. Blanks stay, because they end commands."""
    return _MEMBER.sub("", _OR.sub(",", _DROPPED.sub("", plain(text)))).strip().rstrip(".")


def _equal(gold: str, answer: str) -> bool:
    first, second = _decompose(gold), _decompose(answer)
    if len(first.parts) != len(second.parts):
        return False
    if not first.kind and not second.kind:
        return _equal_expressions(first.parts[0], second.parts[0])
    if first.kind == second.kind and first.kind not in ("set", "list", "union"):
        return all(map(_equal, first.parts, second.parts))
    # Several solutions are a set, with braces or without. A set of one is not its element.
    if first.kind != second.kind and (not {first.kind, second.kind} <= {"set", "list"} or len(first.parts) == 1):
        return False
    rest = list(second.parts)
    for part in first.parts:
        match = next((other for other in rest if _equal(part, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _decompose(text: str) -> _Parts:
    text = text.strip()
    if "\\cup" in text:
        return _Parts("union", text.split("\\cup"))
    start = 2 if text.startswith("\\{") else 1 if text[:1] in ("(", "[", "{") else 0
    if start and _closes_at_end(text):
        inner = _cut(text[start : -2 if text.endswith("\\}") else -1])
        kind = text[:start] + text[-1]
        if kind in ("()", "{}") and len(inner) == 1:
            return _decompose(inner[0])
        return _Parts("set" if start == 2 else kind, inner)
    parts = _cut(text)
    return _Parts("list" if len(parts) > 1 else "", parts)


def _closes_at_end(text: str) -> bool:
    """Whether the bracket that opens the text closes with its end, of whatever shape it is."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0 and character in _CLOSING:
            return place == len(text) - 1
    return False


def _cut(text: str) -> list[str]:
    """The text cut at its outermost commas, each part with a plus-minus sign in two."""
    return [
        part.replace("\\pm", sign)
        for part in latex.outer_parts(text)
        for sign in (("+", "-") if part.count("\\pm") == 1 else ("\\pm",))
    ]


def _equal_expressions(gold: str, answer: str) -> bool:
    first, second = latex.normalise(gold), latex.normalise(answer)
    if not first or not second or first == second:
        return bool(first) and first == second
    values = latex.rational(first), latex.rational(second)
    if None not in values:
        return values[0] == values[1]
    if any(pattern.search(text) for pattern in (_BASE, _MEANT) for text in (first, second)):
        return False
    return _proved(gold, answer)


def _proved(gold: str, answer: str) -> bool:
    # It warns that its own time limits are off, for which the pool has one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    reader = [LatexExtractionConfig()]
    texts = [_DECIMAL.sub(_as_fraction, text) for text in (gold, answer)]
    # Only its LaTeX reader is used, because the other one evaluates text as Python.
    first, second = (parse(f"${text}$", reader, fallback_mode="no_fallback", parsing_timeout=None) for text in texts)
    if not (first and second and verify(first, second, timeout_seconds=None)):
        return False
    return _same(first[0], second[0])


def _as_fraction(match: re.Match[str]) -> str:
    """An exact fraction, so that nothing is rounded to a binary one."""
    return rf"\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}"


def _same(gold: Any, answer: Any) -> bool:
    """Whether two expressions that math-verify calls equal are so exactly."""
    # As math-verify does: `x = 5` states 5, where the other answer is no equation.
    if isinstance(answer, Eq) and not isinstance(gold, Relational):
        answer = answer.rhs
    elif isinstance(gold, Eq) and not isinstance(answer, Relational):
        gold = gold.rhs
    if gold == answer:
        return True
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return gold.shape == answer.shape and all(map(_same, gold.flat(), answer.flat()))
    if isinstance(gold, Relational) and isinstance(answer, Relational):
        return _same_relation(gold, answer)
    if isinstance(gold, Expr) and isinstance(answer, Expr) and (gold.atoms(Number) or answer.atoms(Number)):
        return _is_zero(gold - answer)
    parts, others = getattr(gold, "args", ()), getattr(answer, "args", ())
    if parts and len(parts) == len(others) and type(gold) is type(answer):
        return all(map(_same, parts, others))
    # Names: `abc` is read as a product in one answer and as a word in the other.
    return not (gold.atoms(Number) or answer.atoms(Number))


def _same_relation(gold: Any, answer: Any) -> bool:
    """Whether one is the other, or turned around, or both sides times a constant."""
    difference, other = gold.lhs - gold.rhs, answer.lhs - answer.rhs
    if difference == 0 or other == 0:
        return False
    ratio = simplify(difference / other)
    if not ratio.is_number or ratio.is_zero is not False:
        return False
    if isinstance(gold, Eq) or isinstance(answer, Eq):
        return type(gold) is type(answer)
    return bool(ratio.is_positive) if type(gold) is type(answer) else bool(ratio.is_negative)


def _is_zero(difference: Any) -> bool:
    difference = simplify(difference.doit())
    return bool(difference == 0 or (difference.is_number and difference.equals(0) is True))
