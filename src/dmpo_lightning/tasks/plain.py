r"""How texts of models write signs, blanks and digits, in one spelling each. Used by all ``verified`` checks."""

import re

_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"), "-")
_TIMES = dict.fromkeys(map(ord, "\u00d7\u00b7\u22c5\u2217\u2219\u2022\u2715\u2716\uff0a"), "*")
_DIVIDE = dict.fromkeys(map(ord, "\u00f7\u2215\u2044\uff0f"), "/")
_OTHERS = dict(zip(map(ord, "\uff0b\uff1d\uff08\uff09\uff1c\uff1e"), "+=()<>", strict=True))
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u2061\u2062"), "")
_CHARACTERS = _DASHES | _DIVIDE | _OTHERS | _INVISIBLE
OPERATORS = _CHARACTERS | _TIMES
"""For `str.translate`: signs of arithmetic as ASCII. The dots among them mean other things outside arithmetic."""
VULGAR = {
    ord(character): f" {numerator}/{denominator}"
    for character, numerator, denominator in [
        *(("\u00bd", 1, 2), ("\u2153", 1, 3), ("\u2154", 2, 3), ("\u00bc", 1, 4), ("\u00be", 3, 4)),
        *(("\u2155", 1, 5), ("\u2156", 2, 5), ("\u2157", 3, 5), ("\u2158", 4, 5), ("\u2159", 1, 6)),
        *(("\u215a", 5, 6), ("\u215b", 1, 8), ("\u215c", 3, 8), ("\u215d", 5, 8), ("\u215e", 7, 8)),
    ]
}
"""For `str.translate`: fractions of one character."""
# Blanks that a text does not break at. Between groups of three digits they separate thousands, as a plain one may not.
_HARD_BLANK = r"(?:(?<!\\)\\[,:;> ]|~|\{,\}|[\u00a0\u2007\u2008\u2009\u200a\u202f])"
_THOUSANDS = re.compile(rf"(?<![0-9.,])[0-9]{{1,3}}(?:{_HARD_BLANK}+[0-9]{{3}})+(?![0-9])")
_BLANK = re.compile(_HARD_BLANK)


def plain(text: str) -> str:
    r"""The text with ASCII signs and plain blanks, and without blanks between thousands.

    En dashes and U+2212 are ``-``. ``9\,500``, ``9~500`` and ``9 500`` with a no-break blank are 9500, but with a plain
    blank two numbers. ``\!`` is dropped.
    """
    text = text.translate(_CHARACTERS).replace("\\!", "").replace(",{}", ",")
    text = _THOUSANDS.sub(lambda match: re.sub("[^0-9]", "", match.group()), text)
    return _BLANK.sub(lambda match: "," if match.group() == "{,}" else " ", text)
