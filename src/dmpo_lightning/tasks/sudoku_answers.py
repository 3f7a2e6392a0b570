"""The answer checks of 4x4 Sudoku: what a completion fills in."""

import re

from dmpo_lightning.tasks.answers import final_answer

CELLS = 16
_ENDS = ("<|eot_id|>", "<|endoftext|>")


def published_answer(completion: str) -> str:
    """16 characters as d1 reads them: the first place around an answer tag that is not blank, without white space, cut
    or padded with 0; empty if there is none.
    """
    found = (_fenced, _tagged, _behind_tag, _digits_before_tag, _digits_anywhere)
    answer = next((text for find in found if (text := "".join(find(completion).split()))), "")
    return answer[:CELLS].ljust(CELLS, "0") if answer else ""


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
    match = re.search(r"(\d{16})\s*</answer>", text)
    return match.group(1) if match else ""


def _digits_anywhere(text: str) -> str:
    match = re.search(r"\b(\d{16})\b", text)
    return match.group(1) if match else ""


def verified_answer(puzzle: str, completion: str) -> str | None:
    """A grid of 16 digits that keeps the clues, from the last answer; white space, ``|``, ``-``, ``+`` and commas
    between the digits are layout. None if it is anything else.
    """
    answer = "".join(character for character in final_answer(completion)[:1000] if character not in " \t\r\n|-+,;`[]")
    fits = re.fullmatch(r"[0-4]{16}", answer) is not None and all(
        clue in ("0", digit) for clue, digit in zip(puzzle, answer, strict=True)
    )
    return answer if fits else None
