r"""Finding the answer in a completion. Text is parsed, never evaluated. Every function is linear in its length."""

import re

_END = re.compile(r"<\|(?:eot_id|endoftext|im_end)\|>")
_CUT_TAG = re.compile(r"(?:</?[a-z]*>?|>)\Z")
_BRACE = re.compile("[{}]")
_BOX = re.compile(r"\\(?:boxed|fbox)\{([^{}]*\})?")
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


def final_answer(completion: str) -> str:
    r"""What a reader takes for the answer, stripped. It is empty if the completion states none. The ``verified`` rule.

    The text ends at the first end token. The answer is the last box with more than dots in it, of what the last
    ``<answer>`` holds or, if that holds none, of the whole text. Without such a box it is what the tag holds, and
    without a tag a text of one line. Nested braces are respected. A box or tag that was cut off at the end counts as
    far as it goes.
    """
    text = _END.split(completion, maxsplit=1)[0]
    tagged = tag_text(text) if "<answer>" in text else ""
    boxes = [box for box in _boxes(tagged) or _boxes(text) if box.strip(" .\\ldots")]
    one_line = "" if "<answer>" in text or "\n" in text.strip() else text
    return _CUT_TAG.sub("", boxes[-1] if boxes else tagged or one_line).strip()


def _boxes(text: str) -> list[str]:
    r"""The arguments of every outermost ``\boxed{`` or ``\fbox{``. A box that never closes has the rest of its line."""
    boxes: list[str] = []
    place = 0
    for match in _BOX.finditer(text):
        # Inside the box before, whose argument holds it already.
        if match.start() < place:
            continue
        start = text.index("{", match.start()) + 1
        end = match.end() - 1 if match[1] else closing_brace(text, match.start())
        if end is None:
            return [*boxes, text[start:].partition("\n")[0]]
        boxes.append(text[start:end])
        place = end + 1
    return boxes


def closing_brace(text: str, start: int) -> int | None:
    """Place of the first ``}`` from ``start`` on that closes as many braces as were opened. None if there is none."""
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0 and brace.group() == "}":
            return brace.start()
    return None
