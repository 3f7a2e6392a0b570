r"""Finding the answer in a completion. Text is parsed, never evaluated; every function is linear in its length."""

import re
from collections.abc import Iterator

_END = re.compile(r"<\|(?:eot_id|endoftext|im_end)\|>")
_CUT_TAG = re.compile(r"(?:</?[a-z]*>?|>)\Z")


def tag_text(completion: str) -> str:
    """What follows the last ``<answer>`` (the whole text if there is none), up to the first ``</answer>`` in it,
    stripped.
    """
    return completion.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def answer_blocks(text: str) -> Iterator[str]:
    """What stands between each ``<answer>`` and the next ``</answer>``, unstripped, without overlap."""
    place = 0
    while (start := text.find("<answer>", place)) >= 0 and (end := text.find("</answer>", start + 8)) >= 0:
        yield text[start + 8 : end]
        place = end + 9


def boxes_of_a_line(text: str) -> Iterator[str]:
    r"""What stands between each ``\boxed{`` and the first ``}`` after it on the same line: nested braces are cut."""
    place = 0
    while (start := text.find("\\boxed{", place)) >= 0 and (end := text.find("}", start + 7)) >= 0:
        newline = text.find("\n", start + 7, end)
        if newline < 0:
            yield text[start + 7 : end]
        place = end + 1 if newline < 0 else newline + 1


def last_boxed(text: str) -> str | None:
    r"""The last ``\boxed`` with its argument, as published with MATH: ``\boxed `` with a blank reaches to the next
    ``$``; ``\fbox`` stands in for a missing ``\boxed``; a text without either comes back whole; None if no brace
    closes.
    """
    if "\\boxed " in text:
        return "\\boxed " + text.rpartition("\\boxed ")[2].partition("$")[0]
    start = text.rfind("\\boxed")
    start = text.rfind("\\fbox") if start < 0 else start
    return text if start < 0 else _to_closing_brace(text, start)


def _to_closing_brace(text: str, start: int) -> str | None:
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "{":
            depth += 1
        elif text[place] == "}":
            depth -= 1
            if depth == 0:
                return text[start : place + 1]
    return None


def unbox(boxed: str | None) -> str | None:
    r"""The argument of a leading ``\boxed``; another text unchanged; None where there is no value or ``\boxed `` stands
    elsewhere.
    """
    if boxed is None or "\\boxed " in boxed:
        return boxed[7:] if boxed is not None and boxed.startswith("\\boxed ") else None
    return boxed[7:-1] if boxed.startswith("\\boxed{") and boxed.endswith("}") else boxed


def final_answer(completion: str) -> str:
    r"""What a reader takes for the answer, stripped; empty if the completion states none. The ``verified`` rule.

    The text ends at the first end token. Of what the last ``<answer>`` holds, or of the whole text if it holds nothing,
    it is the last box with more than dots in it; without such a box what the tag holds; without a tag a text of one
    line. Nested braces are respected; a box or tag that was cut off at the end counts as far as it goes.
    """
    text = _END.split(completion, maxsplit=1)[0]
    tagged = tag_text(text) if "<answer>" in text else ""
    boxes = [box for box in _boxes(tagged) or _boxes(text) if box.strip(" .\\ldots")]
    one_line = "" if "<answer>" in text or "\n" in text.strip() else text
    return _CUT_TAG.sub("", boxes[-1] if boxes else tagged or one_line).strip()


def _boxes(text: str) -> list[str]:
    r"""Arguments of every outermost ``\boxed{`` or ``\fbox{``; of a box that never closes, the rest of its line."""
    boxes: list[str] = []
    place = 0
    for match in re.finditer(r"\\(?:boxed|fbox)\{", text):
        if match.start() < place:
            continue
        boxed = _to_closing_brace(text, match.start())
        if boxed is None:
            return [*boxes, text[match.end() :].partition("\n")[0]]
        boxes.append(text[match.end() : match.start() + len(boxed) - 1])
        place = match.start() + len(boxed)
    return boxes
