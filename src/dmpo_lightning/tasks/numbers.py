r"""Numbers in prose and LaTeX, exactly: ``1,000``, ``$42``, ``42.0``, ``50\%``, ``1/2``, ``\frac{1}{2}``, ``-3``."""

import re
from fractions import Fraction

MAX_TEXT = 1000
"""Characters of an answer. A longer one is no number."""
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# A minus sign counts unless a word or a bracket stands right before it ("step-5") or a blank right behind it
# ("Answer - 5"). With a blank it counts only where the text starts with it.
_NUMBER = re.compile(rf"((?<![\w)])-(?! )|^ ?- )?(?:\$ ?)?({_DECIMAL})(?: ?/ ?({_DECIMAL}))?")
_FRACTION = re.compile(r"\\[dtc]?frac ?\{ ?(-?[0-9]+) ?\} ?\{ ?(-?[0-9]+) ?\}")
_SHORT_FRACTION = re.compile(r"\\[dtc]?frac ?([0-9]) ?([0-9])")
_NOISE = re.compile(r":00(?![0-9])|\\(?:[!,;: ]|left|right|text|mathrm|mbox|quad)")


def one_number(text: str) -> Fraction | None:
    r"""The one number that a short text states. None if there is none or if it states several different ones.

    Of a text with ``=`` only what follows the last one counts. Commas between thousands (also ``{,}``, ``\,``),
    currency, percent signs, the minutes of a full hour (``2:00``) and words around the number are ignored. Nothing is
    scaled: 50\% is 50. Digits are ASCII.
    """
    if len(text) > MAX_TEXT:
        return None
    text = _NOISE.sub("", text.rpartition("=")[2].replace("{,}", ",")).replace("\u2212", "-").replace("\\$", "$")
    text = _FRACTION.sub(r" \1/\2 ", re.sub(r"\s+", " ", _SHORT_FRACTION.sub(r" \1/\2 ", text)))
    values = {_value(*match.groups()) for match in _NUMBER.finditer(text)}
    return values.pop() if len(values) == 1 else None


def _value(sign: str, numerator: str, denominator: str | None) -> Fraction | None:
    value = _decimal(numerator)
    if denominator is not None:
        divisor = _decimal(denominator)
        if divisor == 0:
            return None
        value /= divisor
    return -value if sign else value


def _decimal(text: str) -> Fraction:
    return Fraction("0" + text.replace(",", ""))
