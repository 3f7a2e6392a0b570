r"""Equivalence of LaTeX answers by a documented normalisation and exact rational values, without algebra.

Two answers are equal if, element by element of their outermost lists, their normal forms are the same text or both have
the same rational value.

Normalising drops white space (but not between digits), ``$ \( \)``, sizes (``\left``), spacing commands, degree signs,
``\$``, ``\%``, a final full stop, words in ``\text{...}`` after a number, the command but not the words of other
``\text{...}``, and commas between thousands. It takes what follows ``x =``. It writes ``\dfrac`` and ``\tfrac`` as
``\frac``, ``\frac12`` and ``\sqrt2`` with braces, ``x^{2}`` as ``x^2``, and ``\leq`` as ``\le``.

Sums in another order, simplified roots and factors multiplied out are not equal, though mathematics says so. `algebra`
compares those.
"""

import re
from fractions import Fraction

from dmpo_lightning.tasks.arithmetic import ExpressionError, exact_value

MAX_TEXT = 500
"""Characters of an answer. A longer one equals nothing."""
_SPACING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|[Bb]igg?[lr]?)(?![a-zA-Z])|(?<!\\)\\[!,;: ]|~")
_UNIT = re.compile(r"(?<=[0-9.}])(?:\\ )?\s*\\(?:text|mbox|mathrm|textrm)\{[^{}]*\}(?:\^\{?[0-9]\}?)?$")
_WORDS = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf)\{([^{}]*)\}")
_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?:\.[0-9]+)?")
_FRACTION = re.compile(r"\\frac\{(-?[0-9.]+)\}\{(-?[0-9.]+)\}")
_KEPT_BLANK = "\x00"
# In this order: `\$` before `$`, or its backslash would stay behind.
_SYNONYMS = {
    "\\dfrac": "\\frac",
    "\\tfrac": "\\frac",
    "\\cfrac": "\\frac",
    "\\geq": "\\ge",
    "\\leq": "\\le",
    "\\neq": "\\ne",
    "\u2212": "-",
    "\u03c0": "\\pi",
    "\u221e": "\\infty",
    "^{\\circ}": "",
    "^\\circ": "",
    "\\degree": "",
    "\u00b0": "",
    "\\$": "",
    "\\%": "",
    "%": "",
    "$": "",
    "\\(": "",
    "\\)": "",
    "\\[": "",
    "\\]": "",
}


def equivalent(first: str, second: str) -> bool:
    """Whether two LaTeX answers are the same by the rules above. An empty answer equals nothing."""
    if max(len(first), len(second)) > MAX_TEXT:
        return False
    left, right = elements(normalise(first)), elements(normalise(second))
    return len(left) == len(right) and all(map(_same, left, right)) and any(left)


def _same(first: str, second: str) -> bool:
    if first == second:
        return True
    value = rational(first)
    return value is not None and value == rational(second)


def canonical(text: str) -> tuple[str | Fraction, ...]:
    """The same for answers that are `equivalent`. Of a text longer than an answer may be, the beginning counts."""
    parts = elements(normalise(text[:MAX_TEXT]))
    return tuple(part if (value := rational(part)) is None else value for part in parts)


def normalise(text: str) -> str:
    """The normal form of an answer, as the module describes it."""
    text = text.strip()
    for spelling, other in _SYNONYMS.items():
        text = text.replace(spelling, other)
    text = _SPACING.sub("", text).strip().rstrip(".")
    # Units first: behind a number words go, elsewhere they are the answer.
    text = _WORDS.sub(r"\1", _UNIT.sub("", text))
    # A blank between digits separates numbers ("3 4" is not 34), so a character stands in for it that no split drops.
    text = "".join(re.sub(r"(?<=[0-9])\s+(?=[0-9])", _KEPT_BLANK, text).split())
    # `\in` must end there, because `\infty` and `\int` begin with it.
    text = re.sub(r"^[a-zA-Z](?:\([a-z]\))?(?:=|\\in(?![a-z]))", "", text)
    # Only where this is the whole answer. In any other a comma separates elements.
    if _THOUSANDS.fullmatch(text):
        text = text.replace("{,}", "").replace(",", "")
    text = re.sub(r"\\frac([0-9a-z])([0-9a-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([0-9a-z])\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\frac\{([^{}]*)\}([0-9a-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt([0-9a-z])", r"\\sqrt{\1}", text)
    return re.sub(r"([\^_])\{([0-9a-z])\}", r"\1\2", text)


def elements(text: str) -> list[str]:
    """The text cut at its outermost commas. The brackets of a tuple, an interval or a set are elements themselves."""
    opened = text[:1] if text[:1] in ("(", "[") or text.startswith("\\{") else ""
    if opened and text[-1:] in (")", "]", "}") and "," in text:
        start = 2 if opened == "\\" else 1
        end = len(text) - (2 if text.endswith("\\}") else 1)
        return [text[:start], *_cut(text[start:end]), text[end:]]
    return _cut(text)


def _cut(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def rational(text: str) -> Fraction | None:
    """The exact value of a number, a fraction or an arithmetic expression. None for anything else."""
    text = _FRACTION.sub(r"((\1)/(\2))", text).replace("\\cdot", "*").replace("\\times", "*").replace("\\div", "/")
    if re.search(r"[0-9)]\(", text) or len(text) > 100:
        return None
    try:
        return exact_value(text)
    except ExpressionError:
        return None
