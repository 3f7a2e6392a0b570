r"""Equivalence of LaTeX answers by a documented normalisation and exact rational values, without algebra.

Two answers are equal if, element by element of their outermost lists, their normal forms are the same text or both have
the same rational value.

Normalising reads texts as `numbers.plain` does. It drops white space (but not between digits), ``$ \( \)``, sizes
(``\left``), spacing commands, degree signs, currency, ``\%``, a final full stop, braces around a whole element,
parentheses around a single letter, units after a number (in ``\text{...}``, or a few known ones without), the command
but not the words of other ``\text{...}``, and commas and no-break blanks between thousands. It takes what follows
``x =``. It writes ``\dfrac`` and ``\tfrac`` as ``\frac``, ``\frac12`` and ``\sqrt2`` with braces, ``x^{2}`` as
``x^2``, and ``\leq`` as ``\le``. A number before a fraction less than one is a mixed number.

Sums in another order, simplified roots and factors multiplied out are not equal, though mathematics says so. `algebra`
compares those.
"""

import re
from fractions import Fraction

from dmpo_lightning.tasks.answers import closing_brace
from dmpo_lightning.tasks.arithmetic import ExpressionError, exact_value
from dmpo_lightning.tasks.numbers import VULGAR, WORD, plain

MAX_TEXT = 500
"""Characters of an answer. A longer one equals nothing."""
_SPACING = re.compile(r"\\(?:left|right|displaystyle|[Bb]igg?[lr]?)(?![a-zA-Z])")
_BLANK = re.compile(r"\\q?quad(?![a-zA-Z])|(?<!\\)\\[,;:> ]|~")
_BEHIND_NUMBER = r"(?:(?<=[0-9.})])|(?<=\\pi))\s*"
# Words that say more than in what something is counted: 10 a.m. is not 10 p.m., and 5 million is not 5.
MEANING_WORDS = r"noon|midnight|hundred|thousand|[mbtr]+illion|dozen|north|south|east|west|left|right"
_MEANING = rf"(?!\s*(?:[ap]\.?\s?m\b|{MEANING_WORDS}))"
_WORD = r"\\(?:text|mbox|mathrm|textrm)"
_UNIT = re.compile(
    rf"{_BEHIND_NUMBER}(?:{_WORD}\{{{_MEANING}[^{{}}]*\}}(?:\s*\^\s*(?:\{{-?[0-9]\}}|-?[0-9]))?\s*(?:[./]\s*)?)+$",
    re.IGNORECASE,
)
_BARE_UNIT = re.compile(
    rf"{_BEHIND_NUMBER}(?:(?:square|cubic|sq\.?|cu\.?)\s+)?(?:mm|cm|km|kg|ft|(?<=\s)in|inch(?:es)?|foot|feet|yards?|miles?|units?"
    r"|(?:centi|milli|kilo)?met(?:er|re)s?|(?<=\s)m(?=\s*\^)|degrees?|hours?|minutes?|seconds?|days?|weeks?|months?|years?"
    r"|dollars?|cents?|(?:kilo)?grams?|pounds?|lit(?:er|re)s?)(?:\s*\^?\s*(?:\{[23]\}|[23]))?$"
)
_INNER_POWER = re.compile(rf"({_WORD}\{{[^{{}}]*?)\s*\^\s*(?:\{{[0-9]\}}|[0-9])\s*(?=\}})")
_WORDS = re.compile(rf"{WORD}\{{([^{{}}]*)\}}")
_CHOICE = re.compile(r"\(?([A-Za-z])\)")
"""A choice of several, or a variable that needs no parentheses."""
_HOUR = re.compile(r"(?<=[0-9])\s*([ap])\.?\s?m\.?$", re.IGNORECASE)
_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_SPACED_LIST = re.compile(r"[0-9],\s+[0-9]")
_MIXED = re.compile(r"(-?)([0-9]+)\x00?(?:\\frac\{([0-9]+)\}\{([0-9]+)\}|(?<=\x00)([0-9]+)/([0-9]+))")
_FRACTION = re.compile(r"\\frac\{(-?[0-9.]+)\}\{(-?[0-9.]+)\}")
_KEPT_BLANK = "\x00"
_SYNONYMS = {
    "\\dfrac": "\\frac",
    "\\tfrac": "\\frac",
    "\\cfrac": "\\frac",
    "\\geq": "\\ge",
    "\\leq": "\\le",
    "\\neq": "\\ne",
    "\u2264": "\\le ",
    "\u2265": "\\ge ",
    "\u2260": "\\ne ",
    "\\leqslant": "\\le",
    "\\geqslant": "\\ge",
    "\\lt ": "<",
    "\\gt ": ">",
    "\u00d7": "\\times ",
    "\u00b7": "\\cdot ",
    "\u03c0": "\\pi",
    "\u221e": "\\infty",
}
# `\$` before `$`, or its backslash would stay behind.
_DROPPED = (
    *("^{\\circ}", "^\\circ", "\\degree", "\u00b0", "\\$", "\u00a3", "\u20ac", "\\pounds", "\\euro", "\\%", "%", "$"),
    *("\\(", "\\)", "\\[", "\\]"),
)


def equivalent(first: str, second: str) -> bool:
    """Whether two LaTeX answers are the same by the rules above. An empty answer equals nothing."""
    if max(len(first), len(second)) > MAX_TEXT:
        return False
    left = canonical(first)
    return left == canonical(second) and any(part != "" for part in left)


def canonical(text: str) -> tuple[str | Fraction, ...]:
    """The same for answers that are `equivalent`. Of a text longer than an answer may be, the beginning counts."""
    parts = elements(normalise(text[:MAX_TEXT]))
    return tuple(part if (value := rational(part)) is None else value for part in parts)


def normalise(text: str) -> str:
    """The normal form of an answer, as the module describes it."""
    text = plain(text).translate(VULGAR).strip()
    for spelling, other in _SYNONYMS.items():
        text = text.replace(spelling, other)
    for dropped in _DROPPED:
        text = text.replace(dropped, "")
    text = _BLANK.sub(" ", _SPACING.sub("", text)).strip().rstrip(".")
    # Units first: behind a number words go, elsewhere they are the answer.
    text = _BARE_UNIT.sub("", _UNIT.sub("", _INNER_POWER.sub(r"\1", text)))
    found = 1
    while found:
        text, found = _WORDS.subn(r"\1", text)
    text = _HOUR.sub(lambda match: match[1].lower() + "m", text).rstrip(".")
    is_spaced_list = _SPACED_LIST.search(text) is not None
    # A blank between digits separates numbers ("3 4" is not 34), so a character stands in for it that no split drops.
    text = "".join(re.sub(r"(?<=[0-9])\s+(?=[0-9])", _KEPT_BLANK, text).split())
    # `\in` must end there, because `\infty` and `\int` begin with it.
    text = re.sub(r"^[a-zA-Z](?:\([a-z]\))?(?:=|\\in(?![a-z]))", "", _unbraced(text))
    # Only where this is the whole answer. In any other a comma separates elements, and so does one before a blank.
    if _THOUSANDS.fullmatch(text) and not is_spaced_list:
        text = text.replace(",", "")
    text = re.sub(r"\\frac([0-9a-z])([0-9a-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([0-9a-z])\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\frac\{([^{}]*)\}([0-9a-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt([0-9a-z])", r"\\sqrt{\1}", text)
    return re.sub(r"([\^_])\{([0-9a-z])\}", r"\1\2", text)


def _unbraced(text: str) -> str:
    """Without braces around the whole, and without parentheses around one letter: ``(C)`` is C."""
    while text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
        text = text[1:-1]
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text


def elements(text: str) -> list[str]:
    """The text cut at its outermost commas. The brackets of a tuple, an interval or a set are elements themselves."""
    opened = text[:1] if text[:1] in ("(", "[") or text.startswith("\\{") else ""
    if opened and text[-1:] in (")", "]", "}") and "," in text:
        start = 2 if opened == "\\" else 1
        end = len(text) - (2 if text.endswith("\\}") else 1)
        return [text[:start], *map(_unbraced, outer_parts(text[start:end])), text[end:]]
    return [*map(_unbraced, outer_parts(text))]


def outer_parts(text: str) -> list[str]:
    """The text cut at its outermost commas."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def rational(text: str) -> Fraction | None:
    """The exact value of a number, a fraction, a mixed number or an arithmetic expression. None for anything else."""
    mixed = _MIXED.fullmatch(text)
    if mixed:
        sign, whole, *parts = (part for part in mixed.groups() if part is not None)
        numerator, denominator = map(int, parts)
        value = int(whole) + Fraction(numerator, denominator) if numerator < denominator else None
        return -value if value is not None and sign else value
    text = _FRACTION.sub(r"((\1)/(\2))", text).replace("\\cdot", "*").replace("\\times", "*").replace("\\div", "/")
    if re.search(r"[0-9)]\(", text) or len(text) > 100:
        return None
    try:
        return exact_value(text)
    except ExpressionError:
        return None
