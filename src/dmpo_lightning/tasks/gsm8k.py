"""GSM8K: grade-school word problems with one number as the answer (Cobbe et al. 2021)."""

import re
from collections.abc import Mapping
from typing import Any

from dmpo_lightning.tasks.answers import final_answer, first_block, tag_text
from dmpo_lightning.tasks.base import Example, Verdict
from dmpo_lightning.tasks.benchmark import EVAL_FORMAT, MATH_EXPERT, TRAIN_FORMAT, Benchmark
from dmpo_lightning.tasks.numbers import one_number

_PUBLISHED_NUMBER = re.compile(r"-?\d+\.?\d*")
_TO_LAST_DIGIT = re.compile(r".*\d", re.DOTALL)
_NUMBER_BACKWARDS = re.compile(r"[\d.]*-?")
# `float` reads not-a-number and infinity too, and so does the published check.
_LETTERS = r"[nN][aA][nN]|[iI][nN][fF](?:[iI][nN][iI][tT][yY])?"
_FLOAT = re.compile(rf"[-+]?(?:[\d_.]+(?:[eE][-+]?[\d_]+)?|{_LETTERS})")
_MAY_BE_NUMBER = re.compile(r"[\dnN]")
_BOX = re.compile(r"\\boxed\{(?:([^}\n]*)\}|[^}\n]*)")
"""A box that closes on its line, or another opening and its line up to there, so that no line is searched twice."""


class GSM8K(Benchmark):
    """Word problems. An example holds ``question`` and ``answer``, the gold number as text.

    Rewards ``published`` are the five of d1 and DMPO: ``tags``, ``soft_format``, ``strict_format``, ``integer``,
    ``correctness``. Their known faults are kept. Reasoning of several lines never earns a format reward. A completion
    that ends in ``</answer>`` without a newline pays for its length. "1,000", "$42" and "42.0" are wrong.

    Rewards ``verified`` are ``format``, 0.5 for reasoning and answer in tags, of any number of lines, and
    ``correctness``, 2.0 for the right answer.

    The check ``published`` takes the first box with a number, else the last number of the first answer tag, and
    compares floats. ``verified`` compares the one number of the last answer exactly, see `numbers.one_number`.

    Example:
        >>> from dmpo_lightning import GSM8K
        >>> GSM8K().score({"answer": "7"}, "<reasoning>3 + 4</reasoning><answer>7</answer>")
        {'format': 0.5, 'correctness': 2.0}
    """

    columns = ("question", "answer")
    fields = ("question",)
    instructions = {"train": TRAIN_FORMAT, "eval": f"{MATH_EXPERT} \n{EVAL_FORMAT}"}

    def task_text(self, example: Example) -> str:
        return str(example["question"])

    def published_components(self, example: Example, completion: str) -> dict[str, float]:
        answer = tag_text(completion)
        return {
            "tags": published_tag_counts(completion),
            "soft_format": 0.5 * published_soft_format(completion),
            "strict_format": 0.5 * published_strict_format(completion),
            "integer": 0.5 * answer.isdigit(),
            "correctness": 2.0 * (answer == example["answer"]),
        }

    def published_check(self, example: Example, completion: str) -> Verdict:
        """As d1 evaluates. A gold answer that is no float is never met."""
        # A saved record may lack the gold answer.
        answer, gold = published_answer(completion), _as_float(example["answer"] or "")
        return Verdict(answer, answer is not None and answer == gold)

    def verified_check(self, example: Example, completion: str) -> Verdict:
        """Exact equality of the one number in the answer with the gold number."""
        text = final_answer(completion)
        answer, gold = one_number(text), one_number(example["answer"] or "")
        return Verdict(text[:200] or None, answer is not None and answer == gold, canonical=answer)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Example:
        """The gold number stands behind the last ``####``. Raises ValueError for none, and for two different ones."""
        if not isinstance(row["answer"], str):
            raise ValueError(f"`answer` must be a text that ends in `#### NUMBER`, got {row['answer']!r}")
        *earlier, answer = (part.strip() for part in row["answer"].split("####"))
        gold = one_number(answer)
        if not earlier or gold is None:
            raise ValueError(f"`answer` must end in `#### NUMBER`, got {row['answer'][-40:]!r}")
        # A mark may also be a headline. Where a number follows it, nobody can tell which of them is meant.
        others = {one_number(part) for part in earlier[1:] if re.fullmatch(r"[^A-Za-z\n]+", part)}
        if others - {None, gold}:
            raise ValueError(f"`answer` states several numbers behind `####`: {row['answer'][-40:]!r}")
        return {"question": row["question"], "answer": answer}

    @classmethod
    def from_saved(cls, record: Mapping[str, Any]) -> Example:
        gold = record["ground_truth"]
        return {"question": record["question"], "answer": None if gold is None else str(gold)}


def published_answer(completion: str) -> float | None:
    """The first box that is or holds a number, else the last number of the first answer tag.

    A box ends at the first brace and on its line.
    """
    # Each content once, however often a text repeats it.
    for box in filter(_MAY_BE_NUMBER.search, dict.fromkeys(_BOX.findall(completion))):
        number = _as_float(box)
        if number is None and (match := _PUBLISHED_NUMBER.search(box)):
            number = float(match.group())
        if number is not None:
            return number
    block = first_block(completion) or ""
    value = _as_float(block)
    return _last_number(block) if value is None else value


def _last_number(text: str) -> float | None:
    """The last of the numbers that the published pattern matches from the left."""
    # Only the last run of digits and dots, with a minus before it, can hold it. All matches of a long text are slow.
    to_last_digit = _TO_LAST_DIGIT.match(text)
    if to_last_digit is None:
        return None
    backwards = _NUMBER_BACKWARDS.match(to_last_digit.group()[::-1])
    assert backwards is not None
    return float(_PUBLISHED_NUMBER.findall(backwards.group()[::-1])[-1])


def _as_float(text: str) -> float | None:
    """What ``float`` reads. The pattern spares its error messages, which quote the whole text."""
    try:
        return float(text) if _FLOAT.fullmatch(text.strip()) else None
    except ValueError:
        return None


# The published regular expressions are searched by hand where a long text would cost them quadratic time.


def published_tag_counts(completion: str) -> float:
    r"""0.125 for each of four tags that stands exactly once with its newlines, less 0.001 per character after the end.

    Without ``\n</answer>\n`` every character of the completion counts as after the end.
    """
    count = 0.0
    if completion.count("<reasoning>\n") == 1:
        count += 0.125
    if completion.count("\n</reasoning>\n") == 1:
        count += 0.125
    if completion.count("\n<answer>\n") == 1:
        count += 0.125
        # Split from the left, as published: the last occurrence may overlap one that was taken before.
        *_, behind = completion.split("\n</answer>\n")
        count -= len(behind) * 0.001
    if completion.count("\n</answer>") == 1:
        count += 0.125
        count -= (len(completion.rpartition("\n</answer>")[2]) - 1) * 0.001
    return count


def published_soft_format(completion: str) -> bool:
    r"""Whether ``<reasoning>.*?</reasoning>\s*<answer>.*?</answer>`` matches at the start. Tags hold no line break."""
    if not completion.startswith("<reasoning>"):
        return False
    first_line = _line_end(completion, 0)
    line = -1
    for match in re.finditer(r"</reasoning>\s*<answer>", completion):
        if match.start() >= first_line:
            break
        # Else the rest of this line was searched already.
        if match.end() > line:
            line = _line_end(completion, match.end())
            if completion.find("</answer>", match.end(), line) >= 0:
                return True
    return False


def _line_end(text: str, place: int) -> int:
    end = text.find("\n", place)
    return len(text) if end < 0 else end


def published_strict_format(completion: str) -> bool:
    """Whether the completion starts with the six lines of the layout, one line in each tag, and ends there."""
    lines = completion.split("\n", 6)
    return (
        len(lines) == 7
        and (lines[0], lines[2], lines[3], lines[5]) == ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
        and lines[6] in ("", "\n")
    )
