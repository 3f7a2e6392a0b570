"""What a score function returns, as plain numbers. Imports no torch, so that worker processes start fast."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmpo_lightning.rewards.functions import check_function
from dmpo_lightning.tasks.base import Example

TAKES = ("an example", "a completion")
"""What a score function is called with."""
LARGEST = 1e30
"""The largest score. Training computes in single precision, which ends at 3.4e38, with scores that are added up over a
group and divided by the reward temperature."""
ScoreFunction = Callable[[Example, str], "float | Mapping[str, float]"]
BatchScoreFunction = Callable[[Sequence[Example], Sequence[str]], "Sequence[float | Mapping[str, float]]"]


class CombinedScore:
    """Several score functions as one, whose components carry their names.

    Args:
        functions: by name. One that returns named components itself gives ``name/component``.

    Raises:
        ValueError: no functions, or something else than a function of an example and a completion.

    Example:
        ```yaml
        reward:
          class_path: dmpo_lightning.Reward
          init_args:
            score:
              class_path: dmpo_lightning.CombinedScore
              init_args:
                functions: {right: my_rewards.is_right, short: my_rewards.is_short}
            weights: {right: 1.0, short: 0.1}
        ```
    """

    def __init__(self, functions: Mapping[str, ScoreFunction]) -> None:
        if not functions:
            raise ValueError("`functions` must name at least one score function.")
        for name, function in functions.items():
            check_function(f"functions.{name}", function, TAKES)
        self.functions = dict(functions)

    def __call__(self, example: Example, completion: str) -> dict[str, float]:
        """The components of every function. An exception of one is an exception of all."""
        return {
            f"{name}/{part}" if isinstance(value, Mapping) else name: number
            for name, function in self.functions.items()
            for value in [function(example, completion)]
            for part, number in named_numbers(value).items()
        }


def named_numbers(value: Any) -> dict[str, float]:
    """Named numbers. A bare number is called ``reward``.

    Raises:
        ValueError: a number that is not finite, or too large for what is computed with it.
        TypeError: what is no number.
    """
    components = value.items() if isinstance(value, Mapping) else [("reward", value)]
    numbers = {str(name): float(number) for name, number in components}
    if not numbers:
        raise ValueError("the score must hold at least one component, got none")
    if not all(map(math.isfinite, numbers.values())):
        raise ValueError(f"the score must be finite, got {numbers}")
    if max(map(abs, numbers.values())) > LARGEST:
        raise ValueError(f"the score must be at most {LARGEST:g}, got {numbers}")
    return numbers


@dataclass(frozen=True)
class OneScore:
    """A score function whose values are named numbers, and the same function without what an answer check gives."""

    score: ScoreFunction
    unchecked_score: ScoreFunction

    def __call__(self, example: Example, completion: str, with_check: bool = True) -> dict[str, float]:
        return named_numbers((self.score if with_check else self.unchecked_score)(example, completion))


@dataclass(frozen=True)
class BatchScore:
    """A batched score function whose values are named numbers, or what was wrong with one as text."""

    score: BatchScoreFunction

    def __call__(self, examples: Sequence[Example], completions: Sequence[str]) -> list[dict[str, float] | str]:
        """Raises ValueError for another number of results than completions."""
        results = list(self.score(examples, completions))
        if len(results) != len(completions):
            raise ValueError(f"batched scoring must return {len(completions)} results, got {len(results)}")
        return [_numbers_or_problem(result) for result in results]


def _numbers_or_problem(value: Any) -> dict[str, float] | str:
    try:
        return named_numbers(value)
    except (TypeError, ValueError, OverflowError) as error:
        return str(error)
