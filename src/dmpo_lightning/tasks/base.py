"""What a benchmark is: examples, prompts, scores, perhaps an answer check. Plain Python, no tensors."""

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

FACTS = (
    *("task", "prompt style", "system prompt", "instruction", "few-shot examples"),
    *("prefill", "rewards", "verifier"),
)
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


@dataclass(frozen=True)
class Share:
    """How many of an answer's parts are right, for answers that can be right in part."""

    right: int
    of: int
    """Parts that had to be answered, which may be none."""


@dataclass(frozen=True)
class ShareNames:
    """What users of a task read where the `Share` of its verdicts is reported."""

    right: str
    """The score component, and the number of right parts in the counts of ``dmpo-lightning score``."""
    of: str
    """The number of parts in those counts."""
    whole: str
    """The number of answers in those counts of which every part is right."""


@dataclass(frozen=True)
class Verdict:
    """What an answer check says of a completion."""

    answer: str | float | None
    """As the completion states it, before any comparison. None if it states none."""
    correct: bool
    share: Share | None = None
    """Of an answer of several parts: how many are right."""
    canonical: Hashable | None = field(default=None, compare=False)
    """Equal for answers that mean the same. None where the answer itself is compared."""

    @property
    def ballot(self) -> Hashable | None:
        """What a majority vote counts. Without an answer it is None, which is no vote."""
        if self.answer is None or self.answer == "":
            return None
        return self.answer if self.canonical is None else self.canonical

    def components(self, share_name: str | None) -> dict[str, float]:
        """The verdict as score components: ``correct``, and before it the share if there is one and it has a name.

        The share of an answer without parts is 1 if it is correct and else 0.
        """
        correct = float(self.correct)
        if self.share is None or share_name is None:
            return {"correct": correct}
        return {share_name: self.share.right / self.share.of if self.share.of else correct, "correct": correct}


class Task(ABC):
    """A benchmark. Subclass it and name the class in YAML. Nothing needs registering.

    ``accuracy``, `examples`, `prompt` and `score` are all that a task needs. A task with an answer check of its own
    also defines `verify`. The other members have defaults.

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
    """The component of `score` that is reported as accuracy. With an answer check it may also be ``correct`` or the
    name of the share."""
    reward_weights: Mapping[str, float] | None = None
    """Of the components in the reward, where none are configured. None takes each with weight 1."""
    prefill: str = ""
    """What the assistant's turn starts with, behind the chat template's header. A completion is what the model adds:
    neither `score` nor an answer check gets the prefill unless the task puts it in front itself."""
    verifier: str | None = None
    """The name of the answer check, for reports."""
    share_names: ShareNames | None = None
    """What the share in this task's verdicts is called. Without names it is not reported."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # A class that brings a score of its own must not inherit what another class left out of its score: components
        # would be missing from every evaluation.
        if "score" in vars(cls) and "unchecked_score" not in vars(cls):
            cls.unchecked_score = Task.unchecked_score  # type: ignore[method-assign]

    @property
    def share_name(self) -> str | None:
        """The component that holds the share."""
        return None if self.share_names is None else self.share_names.right

    @abstractmethod
    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of a split, in a fixed order. A position in it is the prompt id."""

    @abstractmethod
    def prompt(self, example: Example) -> str | Sequence[Message]:
        """The user's turn, or a whole conversation, before the chat template."""

    @abstractmethod
    def score(self, example: Example, completion: str) -> Mapping[str, float]:
        """Named components of the score of one completion, which is decoded without special tokens.

        It is a pure function and never raises on any text.
        """

    def unchecked_score(self, example: Example, completion: str) -> Mapping[str, float]:
        """The components of `score` except those that the answer check gives (``correct`` and the share).

        An evaluation calls it instead of `score`, because it runs the answer check itself, on the text with special
        tokens. The default is `score`. A task whose `score` runs its answer check saves that work by defining both.
        """
        return self.score(example, completion)

    def verify(self, example: Example, completion: str) -> Verdict:
        """The answer check of an evaluation, which gets the completion with its special tokens.

        The default is no check of its own: correct is what has an accuracy of 1, and no answer is read.
        """
        return Verdict(None, self.score(example, completion)[self.accuracy] == 1)

    @property
    def has_answer_check(self) -> bool:
        """Whether evaluations call `verify`. By default they do if the task defines it."""
        return type(self).verify is not Task.verify

    def drawn(self, example: Example, completion: str | None) -> str | None:
        """A picture of an example in a few lines of text, as reports print it: with the answer of a completion, or of
        the question alone.

        The default is None, where prompt and completion are printed as they are.
        """
        return None

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
            "verifier": self.verifier,
        }
