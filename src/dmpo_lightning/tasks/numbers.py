r"""How texts of models write signs, blanks and numbers: ``1,000``, ``$42``, ``50\%``, ``1/2``, ``2 1/2``, ``minus 3``.

All ``verified`` checks read them in one spelling each, which `plain` gives.
"""

import re
from fractions import Fraction
from unicodedata import numeric

_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212\u2796\ufe58\ufe63\uff0d"), "-")
_TIMES = dict.fromkeys(map(ord, "\u00d7\u00b7\u22c5\u2217\u2219\u2022\u2715\u2716\uff0a"), "*")
_DIVIDE = dict.fromkeys(map(ord, "\u00f7\u2215\u2044\uff0f"), "/")
_OTHERS = dict(zip(map(ord, "\uff0b\uff1d\uff08\uff09\uff1c\uff1e\uff05"), "+=()<>%", strict=True))
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u2061\u2062"), "")
_CHARACTERS = _DASHES | _DIVIDE | _OTHERS | _INVISIBLE
OPERATORS = _CHARACTERS | _TIMES
"""For `str.translate`: signs of arithmetic as ASCII. The dots among them mean other things outside arithmetic."""
_FRACTIONS = "\u00bd\u2153\u2154\u00bc\u00be\u2155\u2156\u2157\u2158\u2159\u215a\u215b\u215c\u215d\u215e"
VULGAR = {ord(character): f" {Fraction(numeric(character)).limit_denominator(8)}" for character in _FRACTIONS}
"""For `str.translate`: fractions of one character."""
# Blanks that a text does not break at. Between groups of three digits they separate thousands, as a plain one may not.
_HARD_BLANK = r"(?:(?<!\\)\\[,:;> ]|~|\{,\}|[\u00a0\u2007\u2008\u2009\u200a\u202f])"
_THOUSANDS = re.compile(rf"(?<![0-9.,])[0-9]{{1,3}}(?:{_HARD_BLANK}+[0-9]{{3}})+(?![0-9])")
_BLANK = re.compile(_HARD_BLANK)
MAX_TEXT = 1000
"""Characters of an answer. A longer one is no number."""
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_CURRENCY = "[$\u00a3\u20ac\u00a5\u20b9]"
WORD = r"\\(?:(?:text|math)(?:rm|bf|it|sf|tt|normal)?|[hm]box|emph|boldsymbol)(?![a-zA-Z])"
"""A command of LaTeX for words."""
# Marks of code and bold type and quotation marks around the whole. The closing one may have been cut off.
_FENCE = re.compile(r"```[\w+-]*[ \t]*\r?\n(.*?)(?:```)?", re.DOTALL)
_WRAPPED = re.compile(r"([*_`]{1,3}|\u2022|[\"'])((?:(?!\1).)+?)(?:\1[.,;:]*)?", re.DOTALL)
_AMOUNT = rf"(?=(?:\\left)?\(?\s*(?:\\?{_CURRENCY}\s*)?(?:\.?[0-9{_FRACTIONS}]|\\(?:[dtc]?frac|sqrt|pi)(?![a-z])))"
# Behind a term `minus` is an operation. It is a sign where a text begins, and behind what ends no term.
_BEFORE_SIGN = (
    r"^[^\w)]*|[:;,.(=\[{\u2248]\s*"
    r"|\b(?:is|are|was|were|be|by|of|to|equals?|gets?|gives?|about|exactly|approximately|so|then)\s+"
)
_SIGN_WORD = re.compile(
    rf"((?<![\w-])(?<![0-9)}}%]\s)(?={WORD}\{{\s*neg|neg)|{_BEFORE_SIGN})(?:{WORD}\{{\s*(?:neg(?:ative|\.)|minus)\s*\}}"
    rf"|neg(?:ative|\.)|minus)(?:\s*|-){_AMOUNT}",
    re.IGNORECASE,
)
_PERCENT_WORD = r"(?:percent(?:ages?)?|per[ -]cent|pct\b\.?)(?:\s+points?)?(?![a-zA-Z])"
_PERCENT = re.compile(
    rf"(?<=[0-9)}}{_FRACTIONS}])(?:\s*{WORD}\{{\s*{_PERCENT_WORD}\s*\}}|(?:\s|-)*{_PERCENT_WORD})", re.IGNORECASE
)
# A minus sign counts unless a word or a bracket stands right before it ("step-5") or a blank right behind it
# ("Answer - 5"). With a blank it counts only where the text starts with it.
_NUMBER = re.compile(
    rf"((?<![\w)])-\(?(?! )|^ ?- \(?)?(?:{_CURRENCY} ?)?(?:([0-9]+)(?: | and )(?=[0-9]+ ?/))?"
    rf"({_DECIMAL})(?: ?/ ?({_DECIMAL}))?"
)
_FRACTION = re.compile(r"\\[dtc]?frac ?(?:\{ ?(-?[0-9]+) ?\}|([0-9])) ?(?:\{ ?(-?[0-9]+) ?\}|([0-9]))")
_NOISE = re.compile(rf":00(?![0-9])|\\(?:left|right|q?quad)(?![a-z])|{WORD}|[{{}}]")
_MONEY = re.compile(r"\\(?:\$|(?:pounds|euro|yen|textdollar|texteuro|textsterling)(?![a-z]))")
# What stands behind a letter or a closing brace is the exponent of a unit: 25 m^2, 25 cm3.
_EXPONENT = re.compile(r"(?<=[A-Za-z}])\s*\^\s*(?:\{\s*-?[0-9]+\s*\}|-?[0-9])|(?<=[A-Za-z])[23](?![0-9.,]*[0-9])")
# Steps of GSM8K's calculator, tags and arrows hold signs of comparison that compare nothing.
_MARKUP = re.compile(r"<<[^<>]*>>|</?[a-zA-Z]+/?>|[-=]+>")
# A text that compares or computes does not state a number, though it may hold only one.
_UNFINISHED = re.compile(
    r"[<>\u2264\u2265\u2260]|\\(?:l|g|n)(?:t|e|eq|eqslant)(?![a-z])|[0-9)](?:\s*\^\s*(?:-?[0-9]|[a-z](?![a-z]))|[\u00b2\u00b3])"
    r"|\b(?i:minus)\W*[0-9]"
    rf"|[0-9)%]\s*(?:[+*\u00d7\u00b7]|\\(?:times|cdot|div|pm)(?![a-z])|- )\s*-?\(?{_CURRENCY}?[0-9]"
)


def plain(text: str) -> str:
    r"""The text with ASCII signs and plain blanks, without blanks between thousands, and without what is around it.

    En dashes and U+2212 are ``-``, and so are ``negative`` and ``minus`` before a number and not behind a term. Behind
    one ``percent``, ``per cent`` and ``pct`` are ``%``. ``9\,500``, ``9~500`` and ``9 500`` with a no-break blank are
    9500, but with a plain blank two numbers. ``\!`` is dropped, and so are a code fence, bold type and quotation marks
    around the whole.
    """
    text = text.translate(_CHARACTERS).replace("\\!", "").replace(",{}", ",").strip()
    fence = _FENCE.fullmatch(text)
    text = fence[1].strip() if fence else text
    while wrapped := _WRAPPED.fullmatch(text):
        text = wrapped[2].strip()
    text = _THOUSANDS.sub(lambda match: re.sub("[^0-9]", "", match.group()), text)
    text = _BLANK.sub(lambda match: "," if match.group() == "{,}" else " ", text)
    return _PERCENT.sub("%", _SIGN_WORD.sub(r"\1-", text))


def one_number(text: str) -> Fraction | None:
    r"""The one number that a short text states. None if there is none or if it states several different ones.

    Of a text with ``=`` only what follows the last one counts. Commas and no-break blanks between thousands (also
    ``{,}``, ``\,``, ``~``), currency, percent signs, the minutes of a full hour (``2:00``), words around the number and
    the exponents of units are ignored. ``2 1/2`` is a mixed number. An inequality, a power or a sum is no number.
    Nothing is scaled: 50\% is 50. Digits are ASCII.
    """
    if len(text) > MAX_TEXT:
        return None
    text = _MARKUP.sub(" ", plain(text)).rpartition("=")[2]
    text = _MONEY.sub("$", text.translate(VULGAR))
    text = " ".join(_FRACTION.sub(_slash, " ".join(text.split())).split())
    # Only behind the first number there can be a unit. A text whose first number is an exponent states none.
    first = re.search("[0-9]", text)
    start = first.start() if first else len(text)
    if text[:start].rstrip(" {-").endswith("^"):
        return None
    text = _NOISE.sub("", text[: start + 1] + _EXPONENT.sub("", text[start + 1 :]))
    if _UNFINISHED.search(text):
        return None
    values = {_value(*match.groups()) for match in _NUMBER.finditer(text)}
    return values.pop() if len(values) == 1 else None


def _slash(match: re.Match[str]) -> str:
    """A fraction as ``1/2``, apart from the number before it but not from its sign."""
    numerator, denominator = match[1] or match[2], match[3] or match[4]
    blank = "" if match.string[: match.start()].endswith("-") else " "
    sign = "-" if (numerator + denominator).count("-") == 1 else ""
    return f"{blank}{sign}{numerator.lstrip('-')}/{denominator.lstrip('-')} "


def _value(sign: str, whole: str | None, numerator: str, denominator: str | None) -> Fraction | None:
    value = _decimal(numerator)
    if denominator is not None:
        divisor = _decimal(denominator)
        if divisor == 0:
            return None
        value /= divisor
    # Of a mixed number the fraction is less than one. Else the two are different numbers.
    if whole is not None:
        if value >= 1:
            return None
        value += int(whole)
    return -value if sign else value


def _decimal(text: str) -> Fraction:
    return Fraction("0" + text.replace(",", ""))
