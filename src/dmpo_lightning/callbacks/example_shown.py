"""An example that a run has learnt to solve, drawn beside its answers before and after."""

from itertools import zip_longest
from typing import Any

from dmpo_lightning.callbacks.samples import shortened
from dmpo_lightning.evaluation.batch import EvaluatedBatch
from dmpo_lightning.tasks.answers import before_end
from dmpo_lightning.tasks.base import Example, Task

KEPT = 64
"""Examples that were wrong before and are remembered until the end, one of which is likely to be right then."""
CHARACTERS = 600
"""Of a text that no task draws."""


class LearntExample:
    """Remembers what was wrong before training, and finds one that is right afterwards."""

    def __init__(self) -> None:
        self.wrong: dict[int, str] = {}
        """The first completions of examples, by their position in the data."""
        self._found: tuple[Example, str, str] | None = None

    def note_before(self, batch: EvaluatedBatch) -> None:
        """Keeps the first wrong completions of an evaluation."""
        for row, index in enumerate(batch.prompt_index):
            if len(self.wrong) < KEPT and not batch.values.correct[row, 0]:
                self.wrong[index] = batch.completions[row][0]

    def note_after(self, batch: EvaluatedBatch) -> None:
        """Looks for the first of them that is right now."""
        for row, index in enumerate(batch.prompt_index):
            if self._found is None and index in self.wrong and batch.values.correct[row, 0]:
                self._found = batch.examples[row], self.wrong[index], batch.completions[row][0]

    def to_text(self, task: Any) -> str:
        """The example as its task draws it, empty if none was learnt."""
        if self._found is None or not isinstance(task, Task):
            return ""
        example, before, after = self._found
        answers = {"before": before, "after": after}
        question = task.drawn(example, None)
        if question is None:
            lines = [f"{moment}: {shortened(before_end(answer), CHARACTERS)}" for moment, answer in answers.items()]
            return "\n".join(["An example that was learnt:", f"prompt: {_prompt(task, example)}", *lines])
        drawings = {"question": question} | {name: task.drawn(example, text) or "" for name, text in answers.items()}
        return "\n".join(["An example that was learnt:", *side_by_side(drawings)])


def side_by_side(drawings: dict[str, str]) -> list[str]:
    """Drawings of several lines beside each other, each below its title."""
    columns = [[title, *drawing.splitlines()] for title, drawing in drawings.items()]
    widths = [max(map(len, column)) for column in columns]
    rows = zip_longest(*columns, fillvalue="")
    return ["    ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _prompt(task: Task, example: Example) -> str:
    prompt = task.prompt(example)
    return shortened(prompt if isinstance(prompt, str) else str(prompt[-1]["content"]), CHARACTERS)
