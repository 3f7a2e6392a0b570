"""What a benchmark is: examples, prompts, and scores of completions. Plain Python, no tensors."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "validation", "test"]
Example = Mapping[str, Any]
Message = Mapping[str, str]
Variant = Literal["published", "verified"]
"""``published`` repeats d1 and DMPO to the bit, with their errors; ``verified`` is what we hold to be right. Numbers of
the two never belong in one table."""
PromptStyle = Literal["train", "eval"]


@dataclass(frozen=True)
class Verdict:
    """What an answer check found in a completion."""

    answer: str | float | None
    """As found, before any comparison; None if there is none."""
    correct: bool
    correct_cells: int | None = None
    """Of Sudoku: blank cells filled as in the solution."""
    blank_cells: int | None = None
    canonical: Hashable | None = field(default=None, compare=False)
    """Equal for answers that mean the same; None where the answer itself is compared."""

    @property
    def ballot(self) -> Hashable | None:
        """What a majority vote counts; None, no vote, without an answer."""
        if self.answer is None or self.answer == "":
            return None
        return self.answer if self.canonical is None else self.canonical


class Task(ABC):
    """A benchmark. Subclass it and name the class in YAML; nothing needs registering.

    Example:
        ```python
        class Parity(Task):
            accuracy = "correct"

            def examples(self, split):
                return [{"number": n} for n in range(100)]

            def prompt(self, example):
                return f"Is {example['number']} even or odd?"

            def score(self, example, completion):
                return {"correct": float(completion.strip() == ("even", "odd")[example["number"] % 2])}
        ```
    """

    accuracy: str
    """The component of `score` that is reported as accuracy."""
    reward_weights: Mapping[str, float] | None = None
    """Of the components in the reward, where none are configured; None takes each with weight 1."""
    prefill: str = ""
    """What the assistant's turn starts with, behind the chat template's header. A completion is what the model adds:
    neither `score` nor an answer check gets the prefill unless the task puts it in front itself.
    """

    @abstractmethod
    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of a split, in a fixed order; a position in it is the prompt id."""

    @abstractmethod
    def prompt(self, example: Example) -> str | Sequence[Message]:
        """The user's turn, or a whole conversation, before the chat template."""

    @abstractmethod
    def score(self, example: Example, completion: str) -> Mapping[str, float]:
        """Named components of the score of one completion (decoded without special tokens); pure, never raises on any
        text.
        """
