r"""Equivalence of LaTeX answers as published with MATH (Hendrycks et al. 2021): normalised strings, nothing computed.

It is for the ``published`` variants only. `latex` is the corrected one.
"""


class NormalisationError(ValueError):
    """A text on which the published normalisation fails. The raw texts are compared then."""


def equivalent(first: str | None, second: str | None) -> bool:
    """Equality after `normalise`, or of the raw texts where that fails. Two missing values are equal."""
    if first is None or second is None or first == second:
        return first == second
    try:
        short, long = sorted((_without_layout(first), _without_layout(second)), key=len)
        wanted = _rewritten(short)
        # Rewriting shortens nothing, so a text that is too long need not be rewritten to be unequal.
        return len(long.replace(" ", "")) <= len(wanted) and _rewritten(long) == wanted
    except NormalisationError:
        return False


def normalise(text: str) -> str:
    r"""The published steps in their order.

    Raises:
        NormalisationError: ``\text{ `` twice, a ``\sqrt`` or ``\frac`` with nothing behind it, or a single ``/`` with a
            side that is no integer.
    """
    return _rewritten(_without_layout(text))


def _without_layout(text: str) -> str:
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "")
    text = _without_unit(text).replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    return _right_side("0" + text if text.startswith(".") else text)


def _rewritten(text: str) -> str:
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    return _fraction_of_slash("\\frac{1}{2}" if text == "0.5" else text)


def _without_unit(text: str) -> str:
    if text.count("\\text{ ") > 1:
        # The published code fails here and in the other places that raise, and then compares the raw texts.
        raise NormalisationError("two units")
    return text.partition("\\text{ ")[0]


def _right_side(text: str) -> str:
    """Without a short ``x=`` in front."""
    left, _, right = text.partition("=")
    # Two characters at most, as published: of a longer left side the answer is taken whole.
    return right if text.count("=") == 1 and len(left) <= 2 else text


def _braced_roots(text: str) -> str:
    first, *rest = text.split("\\sqrt")
    if not all(rest):
        raise NormalisationError("a root of nothing")
    return first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest)


def _braced_fractions(text: str) -> str:
    first, *rest = text.split("\\frac")
    result = [first]
    for part in rest:
        if not part:
            raise NormalisationError("a fraction of nothing")
        if part[0] == "{":
            result.append(part)
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            result.append(f"{{{part[0]}}}{part[1:]}")
        else:
            result.append(f"{{{part[0]}}}{{{part[1]}}}{part[2:]}")
    return "\\frac".join(result)


def _fraction_of_slash(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    try:
        numerator, denominator = map(int, parts)
        return f"\\frac{{{numerator}}}{{{denominator}}}" if text == f"{numerator}/{denominator}" else text
    # No integer, or one of more digits than Python converts.
    except ValueError:
        raise NormalisationError("a side of / is no integer") from None
