"""Reasoning and answer in tags: the published format rewards of d1 and DMPO, and a layout check without their faults.

The published regular expressions are searched by hand where a long text would cost them quadratic time.
"""

import re


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
