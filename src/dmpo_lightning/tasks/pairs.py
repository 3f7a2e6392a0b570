"""Prompt and completion pairs from a file, for supervised fine-tuning."""

import json
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from dmpo_lightning.tasks.base import Example, Message, Split, Task, check_choice
from dmpo_lightning.tasks.json_lines import numbered_lines


class JsonlPairs(Task):
    """Pairs from a JSON-lines file in UTF-8: ``prompt`` (a string, or a list of messages) and ``completion`` per line.

    Args:
        path: of the file.
        validation_share: the share of the pairs that is kept for validation, in [0, 1). These are spread evenly. Above
            0 at least one of two pairs or more is kept.

    Raises:
        ValueError: no such file, or (when read) no pair in it, or a line that is no such pair, named by file and line.
    """

    accuracy = "exact"

    def __init__(self, path: str, *, validation_share: float = 0.02) -> None:
        if not Path(path).is_file():
            raise ValueError(
                f"No file {path!r}; `path` must name a JSON-lines file with a prompt and a completion per line."
            )
        if not 0 <= validation_share < 1:
            raise ValueError(f"`validation_share` must be in [0, 1), got {validation_share}.")
        self.path, self.validation_share = path, validation_share

    @cached_property
    def pairs(self) -> list[Example]:
        """All pairs, in the order of the file."""
        pairs: list[Example] = []
        for number, pair, unreadable in numbered_lines(self.path):
            problem = unreadable or _problem(pair)
            if problem is not None:
                raise ValueError(f"{self.path}, line {number}: {problem}; mend or remove the line.")
            pairs.append(pair)
        if not pairs:
            raise ValueError(f"{self.path} holds no pair; give a file with a prompt and a completion per line.")
        return pairs

    def examples(self, split: Split) -> Sequence[Example]:
        check_choice("split", split, get_args(Split))
        held_out = self._held_out()
        return [pair for index, pair in enumerate(self.pairs) if (index in held_out) == (split != "train")]

    def _held_out(self) -> set[int]:
        """The places of the pairs that are kept for validation."""
        count = len(self.pairs)
        # Of the number as it was written: 0.07 as a float is a little more, and its multiples would be now and then.
        share = Fraction(str(self.validation_share))
        # Each pair with which the share of those so far reaches the next whole number.
        places = {index for index in range(count) if int((index + 1) * share) > int(index * share)}
        # A share of few pairs is less than one, but a checkpoint that is chosen by `val/loss` needs one.
        return places or ({count - 1} if share and count > 1 else set())

    def prompt(self, example: Example) -> str | Sequence[Message]:
        return example["prompt"]

    def score(self, example: Example, completion: str) -> dict[str, float]:
        return {"exact": float(completion.strip() == example["completion"].strip())}


def _problem(pair: Any) -> str | None:
    """What keeps a value from being a pair. None if nothing does."""
    prompt: Any = pair.get("prompt") if isinstance(pair, dict) else None
    completion = pair.get("completion") if isinstance(pair, dict) else None
    if not isinstance(completion, str) or not (isinstance(prompt, str) or _is_conversation(prompt)):
        return (
            f"needs `prompt` and a string `completion`, got {json.dumps(pair)[:120]} (a prompt is a string, or a list "
            "of messages with the strings `role` and `content`)"
        )
    texts = [completion, *([prompt] if isinstance(prompt, str) else (message["content"] for message in prompt))]
    # JSON can write them, but no tokenizer can read them.
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        return "holds half a surrogate pair, which is no character"
    return None


def _is_conversation(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(
            isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in prompt
        )
    )
