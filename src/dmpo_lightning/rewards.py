"""From completions to reward tensors: named components, weights, and completions on which scoring fails."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.tasks.base import Example, Task, Verdict

logger = logging.getLogger(__name__)

ScoreFunction = Callable[[Example, str], "float | Mapping[str, float]"]
AnswerCheck = Callable[[Example, str], Verdict]


@dataclass
class Scores:
    """Components and their weighted sum, for each rollout of each prompt."""

    components: dict[str, Float[Tensor, "batch group"]]
    total: Float[Tensor, "batch group"]
    failures: int
    """Completions on which the score function raised; each got 0 in every component."""


class Reward:
    """A score function with weights for its components.

    Args:
        score: from an example and a completion to a number, or to named components (a task's ``score``, for one).
        weights: of the components in the reward; None takes each with weight 1. Components without a weight are only
            logged.
        accuracy: the component reported as accuracy; None takes the reward itself.
        max_failure_share: of all completions scored so far, counting at least 100; above it the last error stops the
            run.
        verify: the answer check of an evaluation, which reads completions with their special tokens; None has the score
            alone decide.

    Raises:
        ValueError: a weight for a component that the score function does not return (at the first call).
    """

    def __init__(
        self,
        score: ScoreFunction,
        *,
        weights: Mapping[str, float] | None = None,
        accuracy: str | None = None,
        max_failure_share: float = 0.1,
        verify: AnswerCheck | None = None,
    ) -> None:
        self.verify = verify
        self.score, self.weights, self.accuracy = score, weights, accuracy or "reward"
        self.max_failure_share = max_failure_share
        self._scored = self._failed = 0

    @classmethod
    def of_task(cls, task: Task, weights: Mapping[str, float] | None = None) -> "Reward":
        """The reward of a task's own components, with its answer check unless its ``verifier`` is None; without
        weights, with those that the task itself states.
        """
        check = None if getattr(task, "verifier", "") is None else getattr(task, "verify", None)
        weights = task.reward_weights if weights is None else weights
        return cls(task.score, weights=weights, accuracy=task.accuracy, verify=check)

    def __call__(self, examples: Sequence[Example], completions: Sequence[Sequence[str]]) -> Scores:
        """Scores ``completions[i][j]``, the j-th rollout of ``examples[i]``."""
        failures: list[Exception] = []
        rows = [
            [self._components(example, text, failures) for text in texts]
            for example, texts in zip(examples, completions, strict=True)
        ]
        self._scored, self._failed = self._scored + sum(map(len, rows)), self._failed + len(failures)
        if failures and self._failed > self.max_failure_share * max(self._scored, 100):
            raise RuntimeError(
                f"The reward failed on {self._failed} of {self._scored} completions, more than the share of "
                f"{self.max_failure_share} allowed; the last error is above."
            ) from failures[-1]
        names = dict.fromkeys(name for row in rows for components in row for name in components)
        components = {name: torch.tensor([[c.get(name, 0.0) for c in row] for row in rows]) for name in names}
        return Scores(components, self._total(components, (len(rows), len(rows[0]))), len(failures))

    def _components(self, example: Example, completion: str, failures: list[Exception]) -> Mapping[str, float]:
        try:
            return _numbers(self.score(example, completion))
        except (
            Exception
        ) as error:  # a foreign function on model output: one bad completion must not end a run of a week
            logger.warning("The reward raised %r on a completion of example %.200r; it scores 0.", error, example)
            failures.append(error)
            return {}

    def _total(self, components: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        weights = self.weights if self.weights is not None else dict.fromkeys(components, 1.0)
        unknown = set(weights) - set(components)
        if unknown and components:
            raise ValueError(
                f"`weights` names components that the score function did not return: {sorted(unknown)}; it "
                f"returns {sorted(components)}."
            )
        return sum(
            (weight * components[name] for name, weight in weights.items() if name in components), torch.zeros(shape)
        )


def _numbers(value: Any) -> dict[str, float]:
    """Named finite numbers; a bare number is called ``reward``."""
    components = value.items() if isinstance(value, Mapping) else [("reward", value)]
    numbers = {name: float(number) for name, number in components}
    if not all(map(math.isfinite, numbers.values())):
        raise ValueError(f"the score must be finite, got {numbers}")
    return numbers
