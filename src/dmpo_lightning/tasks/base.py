"""What a benchmark is: examples, prompts, scores, perhaps a check. Plain Python, no tensors."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "validation", "test"]
Example = Mapping[str, Any]
Message = Mapping[str, str]
Variant = Literal["published", "verified"]
"""``published`` repeats d1 and DMPO to the bit, with their errors. In the format reward of MATH, where they differ, it
is DMPO's. ``verified`` is what we hold to be right. Numbers of the two variants never belong in one table."""
PromptStyle = Literal["train", "eval"]

FACTS = ("task", "prompt style", "system prompt", "instruction", "few-shot examples", "prefill", "rewards", "check")
"""What every report states of a task."""


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError, with the choices, for a value that is none of them."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def check_sizes(sizes: Mapping[str, int] | None) -> dict[str, int]:
    """Examples per split as a dictionary. Raises ValueError for an unknown split or a count below 1."""
    for split, size in (sizes or {}).items():
        if split not in ("train", "validation", "test") or size < 1:
            raise ValueError(f"`sizes` must map train, validation or test to a positive count, got {split}: {size}.")
    return dict(sizes or {})


def check_template(template: str, fields: Sequence[str]) -> None:
    """Raises ValueError for a prompt template in which one of the fields does not stand."""
    if not all(f"{{{name}}}" in template for name in fields):
        wanted = " and ".join(f"{{{name}}}" for name in fields)
        raise ValueError(f"`prompt_template` must contain {wanted}, got {template!r}.")


def fill_template(template: str, values: Mapping[str, Any]) -> str:
    """The template with each value in place of its name in braces. Of a list the parts stand with a blank between."""
    for name, value in values.items():
        # `format` would stumble over other braces of the template.
        template = template.replace(
            f"{{{name}}}", " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        )
    return template


@dataclass(frozen=True)
class Share:
    """How many of an answer's parts are right, for answers that can be right in part."""

    right: int
    of: int
    """Parts that had to be answered, which may be none."""
    name: str = field(default="share", compare=False)
    """The component that holds the share, and what ``dmpo-lightning score`` calls the number of right parts."""
    of_name: str = field(default="parts", compare=False)
    """What ``dmpo-lightning score`` calls the number of parts."""


@dataclass(frozen=True)
class Verdict:
    """What a check says of a completion."""

    answer: str | float | None
    """As the completion states it, before any comparison. None if it states none."""
    correct: bool
    share: Share | None = None
    """How many parts of the answer are right. None for an answer without parts."""
    canonical: Hashable | None = field(default=None, compare=False)
    """Equal for answers that mean the same. None where the answer itself is compared."""

    @property
    def ballot(self) -> Hashable | None:
        """What a majority vote counts. Without an answer it is None, which is no vote."""
        if self.answer is None or self.answer == "":
            return None
        return self.answer if self.canonical is None else self.canonical

    @property
    def components(self) -> dict[str, float]:
        """The verdict as score components: ``correct``, and before it the share if there is one.

        The share of an answer without parts is 1 if it is correct and else 0.
        """
        correct = float(self.correct)
        if self.share is None:
            return {"correct": correct}
        return {self.share.name: self.share.right / self.share.of if self.share.of else correct, "correct": correct}


class Task(ABC):
    """A benchmark. Subclass it and name the class in YAML. Nothing needs registering.

    `examples`, `prompt` and `score` are all that a task needs. A task whose answers are checked beside
    the score also defines `check`. The other members have defaults.

    Example:
        >>> from dmpo_lightning import Task
        >>> class Parity(Task):
        ...     accuracy = "correct"
        ...     def examples(self, split):
        ...         return [{"number": number} for number in range(0 if split == "train" else 1, 100, 2)]
        ...     def prompt(self, example):
        ...         return f"Is {example['number']} even or odd?"
        ...     def score(self, example, completion):
        ...         return {"correct": float(completion.strip() == ("even", "odd")[example["number"] % 2])}
        >>> Parity().check({"number": 3}, " odd").correct
        True
    """

    accuracy: str | None = None
    """The component of `score` that is reported as accuracy. With a check it may also be ``correct`` or the name of
    the share. None is ``correct`` of the check, or without one the reward itself."""
    reward_weights: Mapping[str, float] | None = None
    """Of the components in the reward, where none are configured. None takes each with weight 1."""
    prefill: str = ""
    """What the assistant's turn starts with, behind the chat template's header. A completion is what the model adds:
    neither `score` nor `check` gets the prefill unless the task puts it in front itself."""
    check_name: str | None = None
    """What reports call the check."""

    @abstractmethod
    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of a split, in a fixed order. A position in it is the prompt's index."""

    @abstractmethod
    def prompt(self, example: Example) -> str | Sequence[Message]:
        """The user's turn, or a whole conversation, before the chat template."""

    @abstractmethod
    def score(self, example: Example, completion: str) -> Mapping[str, float]:
        """Named components of the score of one completion, which is decoded without special tokens.

        It is a pure function and never raises on any text.
        """

    def check(self, example: Example, completion: str) -> Verdict:
        """Whether the answer is right, beside the score.

        It reads the completion with its special tokens, because published checks look for the end of the turn.

        The default is no check of its own: correct is what has an accuracy of 1, and no answer is read.
        """
        numbers = self.score(example, completion)
        weights = {self.accuracy: 1.0} if self.accuracy else self.reward_weights or dict.fromkeys(numbers, 1.0)
        return Verdict(None, sum(weight * numbers[name] for name, weight in weights.items()) == 1)

    @property
    def has_check(self) -> bool:
        """Whether training and evaluations call `check`. By default they do if the task defines it."""
        return type(self).check is not Task.check

    def show(self, example: Example, completion: str | None) -> str | None:
        """A picture of an example in a few lines of text, as reports print it: with the answer of a completion, or of
        the question alone.

        The default is None, where prompt and completion are printed as they are.
        """
        return None

    def difficulty(self, example: Example) -> str | int | None:
        """How hard an example is by the task's own measure, by which reports tell prompts apart.

        The default is the ``level`` of an example that has one.
        """
        return example.get("level") if isinstance(example, Mapping) else None

    @classmethod
    def from_saved(cls, record: Mapping[str, Any]) -> Example:
        """An example from ``question`` and ``ground_truth`` of a saved completion, for ``dmpo-lightning score``.

        Raises:
            ValueError: the record makes no example. The default takes none at all.
        """
        raise ValueError(f"{cls.__name__} makes no example of `question` and `ground_truth`; state `example` instead.")

    def facts(self) -> dict[str, Any]:
        """What the numbers of an evaluation depend on, for its report.

        These are `FACTS`, None where the task does not say, and any others that a task adds.
        """
        return dict.fromkeys(FACTS) | {
            "task": type(self).__name__,
            "few-shot examples": 0,
            "prefill": self.prefill or None,
            "check": self.check_name,
        }
