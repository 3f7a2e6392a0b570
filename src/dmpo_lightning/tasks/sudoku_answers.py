"""The answer checks of 4x4 Sudoku: what a completion fills in."""

import re
from itertools import islice

from dmpo_lightning.tasks.answers import final_answer
from dmpo_lightning.tasks.latin_squares import CELLS, keeps_clues

_ENDS = ("<|eot_id|>", "<|endoftext|>")
_FIRST_CELLS = re.compile(rf"(?:\s*\S){{0,{CELLS}}}")
_WORD_OF_DIGITS = re.compile(rf"(?<!\w)\d{{{CELLS}}}(?!\w)")


def published_answer(completion: str) -> str:
    """The 16 characters that d1 reads: the first place around an answer tag that is not blank.

    White space is dropped and the rest cut or padded with 0. The answer is empty if every place is blank.
    """
    # The order is that of the published patterns.
    places = (_fenced, _tagged, _behind_tag, _digits_before_tag, _digits_anywhere)
    answer = next((text for place in places if (text := _first_cells(place(completion)))), "")
    return answer.ljust(CELLS, "0") if answer else ""


def _first_cells(text: str) -> str:
    """The first 16 characters that are no white space."""
    match = _FIRST_CELLS.match(text)
    return "".join(match.group().split()) if match else ""


def first_digits(text: str) -> str:
    """The first 16 characters that ``isdigit`` calls digits. They need not be ASCII, and ``²`` is one too."""
    return "".join(islice(filter(str.isdigit, text), CELLS))


def _fenced(text: str) -> str:
    """Digits in the first code fence behind the first opening tag."""
    start = text.find("<answer>")
    match = re.compile(r"```([\d\s]+)```").search(text, start + 8) if start >= 0 else None
    return match.group(1) if match else ""


def _tagged(text: str) -> str:
    start = text.find("<answer>")
    if start < 0:
        return ""
    ends = [end for mark in (*_ENDS, "</answer>") if (end := text.find(mark, start + 8)) >= 0]
    return text[start + 8 : min(ends)] if ends else ""


def _behind_tag(text: str) -> str:
    start = text.find("</answer>")
    if start < 0:
        return ""
    ends = [end for mark in _ENDS if (end := text.find(mark, start + 9)) >= 0]
    return text[start + 9 : min(ends, default=len(text))]


def _digits_before_tag(text: str) -> str:
    """The first 16 digits with a closing tag behind them."""
    # Backwards the tag comes before the digits, so that few places can be the start of a match. From the front every
    # digit of a long number could, and the white space behind each would be read again.
    backwards = re.findall(r">rewsna/<\s*(\d{16})", text[::-1])
    return backwards[-1][::-1] if backwards else ""


def _digits_anywhere(text: str) -> str:
    """The first 16 digits that stand alone between word boundaries."""
    # Any 16 neighbours hold one of every 16th character of the text: only around those that are digits need be
    # searched.
    for digits in re.finditer(r"\d+", text[CELLS - 1 :: CELLS]):
        match = _WORD_OF_DIGITS.search(text, CELLS * digits.start(), CELLS * digits.end() + CELLS)
        if match:
            return match.group()
    return ""


def verified_answer(puzzle: str, completion: str) -> str | None:
    """The last answer, if it is a grid of 16 digits that keeps the clues, else None.

    White space, ``|``, ``-``, ``+`` and commas between the digits are layout.
    """
    answer = "".join(character for character in final_answer(completion)[:1000] if character not in " \t\r\n|-+,;`[]")
    fits = re.fullmatch(r"[0-4]{16}", answer) is not None and keeps_clues(puzzle, answer)
    return answer if fits else None
