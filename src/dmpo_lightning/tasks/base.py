"""What a benchmark is: examples, prompts, and scores of completions. Plain Python, no tensors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Split = Literal["train", "validation", "test"]
Example = Mapping[str, Any]
Message = Mapping[str, str]


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
