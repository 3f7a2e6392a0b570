"""Prompt and completion pairs from a file, for supervised fine-tuning."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import get_args

from dmpo_lightning.tasks.base import Example, Message, Split, Task, check_choice


class JsonlPairs(Task):
    """Pairs from a JSON-lines file: ``prompt`` (a string, or a list of messages) and ``completion`` per line.

    Args:
        path: of the file.
        validation_share: the share of the pairs that is kept for validation, in [0, 1). These are spread evenly.

    Raises:
        ValueError: no such file, or (when read) a line that is no such pair, named by file and line.
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
        lines = Path(self.path).read_text(encoding="utf-8").splitlines()
        return [self._pair(number, line) for number, line in enumerate(lines, start=1) if line.strip()]

    def examples(self, split: Split) -> Sequence[Example]:
        check_choice("split", split, get_args(Split))
        # Without a share this is one more than there are pairs, so that none is held out.
        every = round(1 / self.validation_share) if self.validation_share else len(self.pairs) + 1
        held_out = [pair for index, pair in enumerate(self.pairs) if index % every == every - 1]
        if split != "train":
            return held_out
        return [pair for index, pair in enumerate(self.pairs) if index % every != every - 1]

    def prompt(self, example: Example) -> str | Sequence[Message]:
        return example["prompt"]

    def score(self, example: Example, completion: str) -> dict[str, float]:
        return {"exact": float(completion.strip() == example["completion"].strip())}

    def _pair(self, number: int, line: str) -> Example:
        try:
            pair = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}, line {number}: not JSON ({error}); mend or remove the line.") from error
        if not isinstance(pair, dict) or "prompt" not in pair or not isinstance(pair.get("completion"), str):
            raise ValueError(
                f"{self.path}, line {number}: needs `prompt` and a string `completion`, got {line[:80]!r}."
            )
        return pair
