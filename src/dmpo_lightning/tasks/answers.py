r"""Finding the answer in a completion. Text is parsed, never evaluated. Every function is linear in its length."""

import re
from collections.abc import Sequence
from typing import NamedTuple

_END = re.compile(r"<\|(?:eot_id|endoftext|im_end)\|>")
_CLOSING_TAG = re.compile(r"</[a-z]*>?\s*\Z")
_CUT_TAG = re.compile(r"(?:<|>|</[a-z]*>?|<\|[a-z_]*\|?)\s*\Z")
"""What is left of a tag or an end token where a text was cut off. No inequality ends like this; ``2<x`` does not."""
_BRACE = re.compile("[{}]")
# Escapes come first, so that the brace of a set and the backslashes of a line break are not taken for other tokens. A
# box may have lost its backslash, or have become a control character where a program read `\b` or `\f` as one.
_TOKEN = re.compile(
    r"\\[{}\\]|(?:(?:\\|(?<![A-Za-z]))(?:boxed|fbox)|\x08oxed|\x0cbox)\s*\{|\\boxed[ \t]*(?=-?[0-9\\(])|[{}]"
)
_REST_ENDS = re.compile(r"(?<!\\)\$|\n")
_NOTHING = re.compile(r"(?:\s|\.|\\[lc]?dots|\u2026)*")
"""What a box holds that was copied from the prompt."""
_BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def tag_text(completion: str) -> str:
    """What follows the last ``<answer>`` up to the first ``</answer>`` behind it, stripped.

    Without an opening tag the text counts from its start.
    """
    return completion.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def first_block(text: str) -> str | None:
    """What stands between the first ``<answer>`` and the next ``</answer>``, unstripped. None if there is no such."""
    block, closing, _ = text.partition("<answer>")[2].partition("</answer>")
    return block if closing else None


def last_block(text: str) -> str | None:
    """As `first_block`, of the last pair of tags. Pairs are read from the left, each behind the one before."""
    # Behind the last closing tag the search would run to the end for every opening one.
    head, closing, _ = text.rpartition("</answer>")
    blocks = _BLOCK.findall(head + closing)
    return blocks[-1] if blocks else None


def last_boxed(text: str) -> str | None:
    r"""The last ``\boxed`` with its argument, as published with MATH. None if no brace closes.

    ``\boxed `` with a blank reaches to the next ``$``. ``\fbox`` stands in for a missing ``\boxed``. A text without
    either comes back whole.
    """
    if "\\boxed " in text:
        return "\\boxed " + text.rpartition("\\boxed ")[2].partition("$")[0]
    start = text.rfind("\\boxed")
    start = text.rfind("\\fbox") if start < 0 else start
    if start < 0:
        return text
    end = closing_brace(text, start)
    return None if end is None else text[start : end + 1]


def unbox(boxed: str | None) -> str | None:
    r"""The argument of a leading ``\boxed``. Another text comes back unchanged.

    The result is None for None, and for a text in which ``\boxed `` with a blank stands elsewhere.
    """
    if boxed is None or "\\boxed " in boxed:
        return boxed[7:] if boxed is not None and boxed.startswith("\\boxed ") else None
    return boxed[7:-1] if boxed.startswith("\\boxed{") and boxed.endswith("}") else boxed


def before_end(completion: str) -> str:
    """The text up to its first end token."""
    return _END.split(completion, maxsplit=1)[0]


def final_answer(completion: str) -> str:
    r"""What a reader takes for the answer, stripped. It is empty if the completion states none. The ``verified`` rule.

    The text ends at the first end token. The answer is the last box with more than dots in it, of what the last
    ``<answer>`` holds or, if that holds none, of the text around it. Without such a box it is what the tag holds, and
    without a tag a text of one line. A box or tag that was cut off at the end counts as far as it goes.
    """
    text = before_end(completion)
    before, opening, rest = text.rpartition("<answer>")
    tagged, closing, behind = rest.partition("</answer>") if opening else ("", "", text)
    for part in (tagged, behind, before):
        box = last_box(part)
        if box is not None:
            return box.strip()
    if opening:
        return (tagged if closing else _CUT_TAG.sub("", tagged)).strip()
    return "" if "\n" in text.strip() else _CUT_TAG.sub("", text).strip()


def last_box(text: str) -> str | None:
    r"""What the last ``\boxed{`` or ``\fbox{`` holds that holds more than dots. None if there is no such box.

    Of a box inside another the content is part of the outer one's. A box that never closes, or ``\boxed 5`` without
    braces, holds the rest of its line up to a ``$`` or the next box, and hides no later one.
    """
    groups: list[list[_Box]] = []
    for box in _boxes(text):
        if groups and box.start < groups[-1][0].end:
            groups[-1].append(box)
        else:
            groups.append([box])
    limit = len(text)
    # From the last one, so that the contents of the others need not be made.
    for group in reversed(groups):
        content = _content(text, group, limit)
        if not _NOTHING.fullmatch(content):
            return content
        limit = group[0].start
    return None


class _Box(NamedTuple):
    start: int
    inner: int
    """Where the content begins."""
    end: int
    """Of the content. -1 if no brace closes the box."""


def _boxes(text: str) -> list[_Box]:
    """Every box of a text by its start, in one pass."""
    boxes: list[_Box] = []
    opened: list[tuple[int, int] | None] = []
    for token in _TOKEN.finditer(text):
        symbol = token.group()
        if symbol == "{":
            opened.append(None)
        elif symbol == "}":
            box = opened.pop() if opened else None
            if box is not None:
                boxes.append(_Box(*box, token.start()))
        elif len(symbol) > 2:
            if symbol[-1] == "{":
                opened.append(token.span())
            else:
                boxes.append(_Box(*token.span(), -1))
    return sorted([*boxes, *(_Box(*box, -1) for box in opened if box is not None)])


def _content(text: str, group: Sequence[_Box], limit: int) -> str:
    """What the first box of a group holds. The others are inside it, and of them only the content stays."""
    first, *others = group
    if first.end < 0:
        end = _REST_ENDS.search(text, first.inner, limit)
        return _CUT_TAG.sub("", text[first.inner : end.start() if end else limit])
    if not others:
        return _CLOSING_TAG.sub("", text[first.inner : first.end])
    dropped = {place for box in others for place in range(box.start, box.inner)} | {box.end for box in others}
    content = "".join(text[place] for place in range(first.inner, first.end) if place not in dropped)
    return _CLOSING_TAG.sub("", content)


def closing_brace(text: str, start: int) -> int | None:
    """Place of the first ``}`` from ``start`` on that closes as many braces as were opened. None if there is none."""
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0 and brace.group() == "}":
            return brace.start()
    return None


def has_layout(completion: str) -> bool:
    """Whether the completion is one reasoning and one answer in tags, of any number of lines, and nothing else."""
    text = completion.strip()
    reasoning, closing, answer = text.partition("</reasoning>")
    answer = answer.strip()
    tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    return (
        bool(closing)
        and reasoning.startswith("<reasoning>")
        and answer.startswith("<answer>")
        and answer.endswith("</answer>")
        and all(text.count(tag) == 1 for tag in tags)
    )
