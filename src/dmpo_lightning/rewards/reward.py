"""From completions to reward tensors: named components, weights, and completions on which scoring fails."""

import copy
import logging
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.rewards.score_functions import BatchScore, BatchScoreFunction, OneScore, ScoreFunction
from dmpo_lightning.tasks.base import Example, Task, Verdict
from dmpo_lightning.workers import WorkerPool

logger = logging.getLogger(__name__)

CHECKED = ("correct", "correct_cells")
"""Accuracies that an answer check gives, whatever the reward."""
LOGGED_IN_FULL = 3
"""Failures of one call whose cause is logged; of the others only the number is."""

AnswerCheck = Callable[[Example, str], Verdict]
Outcome = dict[str, float] | Exception


@dataclass
class Scores:
    """Components and their weighted sum, for each rollout of each prompt."""

    components: dict[str, Float[Tensor, "batch group"]]
    """NaN where a completion has no such component, as in a mixture of tasks."""
    total: Float[Tensor, "batch group"]
    """Over the components that a completion has."""
    failures: int
    """Completions that could not be scored; each got the failure score in every component."""


class Reward:
    """A score function with weights for its components.

    A completion fails if scoring it raises, takes longer than the time limit, ends its worker, or gives anything but
    finite numbers. It is logged with its prompt id, counted, and gets ``failure_score``.

    Args:
        score: from an example and a completion to a number, or to named components (a task's ``score``, for one);
            several functions become one by `CombinedScore`.
        weights: of the components in the reward; None takes each with weight 1. Components without a weight are only
            logged.
        accuracy: the component reported as accuracy; None takes the reward itself.
        max_failure_share: of all completions scored so far, counting at least 100; above it the last error stops the
            run.
        failure_score: of a failed completion, in every component that the others have.
        batched: ``score`` takes equally long lists of examples and completions instead, and returns one result for
            each; if it raises, all of them fail.
        workers: processes that score; 0 scores in this one. ``score`` must then be picklable.
        time_limit: seconds for one call of ``score``, in workers only: a call that takes longer is killed.
        verify: the answer check of an evaluation, which reads completions with their special tokens; None has the score
            alone decide.

    Raises:
        ValueError: a time limit without workers, several workers for batched scoring, a score function that cannot be
            pickled; weights for a component that the score function does not return (at the first call).
    """

    def __init__(
        self,
        score: ScoreFunction | BatchScoreFunction,
        *,
        weights: Mapping[str, float] | None = None,
        accuracy: str | None = None,
        max_failure_share: float = 0.1,
        failure_score: float = 0.0,
        batched: bool = False,
        workers: int = 0,
        time_limit: float | None = None,
        verify: AnswerCheck | None = None,
    ) -> None:
        if not math.isfinite(failure_score):
            raise ValueError(f"`failure_score` must be finite, got {failure_score}.")
        if not 0 <= max_failure_share <= 1:
            raise ValueError(f"`max_failure_share` must be in [0, 1], got {max_failure_share}.")
        for name, weight in (weights or {}).items():
            if not math.isfinite(weight):
                raise ValueError(f"`weights` must be finite, got {weight} for {name!r}.")
        if time_limit is not None and not workers:
            raise ValueError(
                f"`time_limit` {time_limit} needs worker processes, which can be killed; pass `workers=1` or more."
            )
        if batched and workers > 1:
            raise ValueError(f"`batched` scoring is one call, which one worker makes; got `workers={workers}`, pass 1.")
        self.score, self.weights, self.accuracy = score, weights, accuracy or "reward"
        self.max_failure_share, self.failure_score, self.verify = max_failure_share, failure_score, verify
        self.batched = batched
        self._call: Callable[..., Any] = BatchScore(score) if batched else OneScore(score)  # type: ignore[arg-type]
        self._pool = None if workers == 0 else WorkerPool(self._call, workers=workers, time_limit=time_limit)
        if workers:
            _check_picklable(self._call)
        self._scored = self._failed = 0
        self._weights_are_checked = False

    @classmethod
    def of_task(
        cls,
        task: Task,
        weights: Mapping[str, float] | None = None,
        *,
        max_failure_share: float = 0.1,
        failure_score: float = 0.0,
        workers: int = 0,
        time_limit: float | None = None,
    ) -> "Reward":
        """The reward of a task's own components, with its answer check unless its ``verifier`` is None; without
        weights, with those that the task itself states.
        """
        check = None if getattr(task, "verifier", "") is None else getattr(task, "verify", None)
        return cls(
            task.score,
            weights=task.reward_weights if weights is None else weights,
            accuracy=task.accuracy,
            max_failure_share=max_failure_share,
            failure_score=failure_score,
            workers=workers,
            time_limit=time_limit,
            verify=check,
        )

    def __call__(
        self,
        examples: Sequence[Example],
        completions: Sequence[Sequence[str]],
        prompt_ids: Sequence[int] | None = None,
    ) -> Scores:
        """Scores ``completions[i][j]``, the j-th rollout of ``examples[i]``; prompt ids name failures in the log.

        Raises:
            RuntimeError: more failures than allowed, or workers that cannot start.
        """
        ids = range(len(examples)) if prompt_ids is None else prompt_ids
        rows = [
            (number, example, text)
            for example, texts, number in zip(examples, completions, ids, strict=True)
            for text in texts
        ]
        outcomes = self._outcomes([example for _, example, _ in rows], [text for _, _, text in rows])
        self._count([(rows[i][0], each) for i, each in enumerate(outcomes) if isinstance(each, Exception)], len(rows))
        components = self._components(outcomes, (len(examples), len(completions[0]) if completions else 0))
        failures = sum(isinstance(outcome, Exception) for outcome in outcomes)
        return Scores(components, self._total(components), failures)

    @property
    def name(self) -> str:
        """What scores, for reports."""
        return str(getattr(self.score, "__qualname__", type(self.score).__name__))

    def check(self, example: Example, completion: str, prompt_id: int) -> Verdict:
        """The answer check's verdict on a completion with its special tokens; where it fails, counted as above, nothing
        was answered.
        """
        assert self.verify is not None
        try:
            return self.verify(example, completion)
        except Exception as error:  # foreign code on model output, as in scoring
            self._count([(prompt_id, error)], 0)
            return Verdict(None, False)

    def with_check_of(self, other: "Reward") -> "Reward":
        """This reward with the answer check and the accuracy of another."""
        checked = copy.copy(self)
        checked.verify = other.verify
        checked.accuracy = other.accuracy if other.accuracy in CHECKED else CHECKED[0]
        return checked

    def parts(self, examples: Sequence[Example]) -> "dict[str, tuple[Reward, list[int]]]":
        """Of a mixture of tasks, each task's reward and the places of its examples; empty where there are no parts."""
        return {}

    def close(self) -> None:
        """Ends the worker processes, which otherwise end with the interpreter; the next call starts new ones."""
        if self._pool is not None:
            self._pool.close()

    def _outcomes(self, examples: list[Example], completions: list[str]) -> list[Outcome]:
        calls: list[tuple[Any, ...]] = list(zip(examples, completions, strict=True))
        if not self.batched:
            return self._made(calls)
        (results,) = self._made([(examples, completions)])
        if isinstance(results, Exception):
            return [results] * len(calls)
        return [ValueError(result) if isinstance(result, str) else result for result in results]

    def _made(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The value or the exception of each call, here or in the workers."""
        return [self._attempt(call) for call in calls] if self._pool is None else self._pool.map(calls)

    def _attempt(self, call: tuple[Any, ...]) -> Any:
        try:
            return self._call(*call)
        except Exception as error:  # a foreign function on model output: one bad completion must not end a long run
            return error

    def _count(self, failures: Sequence[tuple[int, Exception]], scored: int) -> None:
        for prompt_id, error in failures[:LOGGED_IN_FULL]:
            logger.warning(
                "The reward failed on a completion of prompt %d, which scores %g: %r",
                prompt_id,
                self.failure_score,
                error,
                exc_info=error,
            )
        if len(failures) > LOGGED_IN_FULL:
            others = sorted({prompt_id for prompt_id, _ in failures[LOGGED_IN_FULL:]})
            logger.warning(
                "The reward failed on %d more completions, of prompts %.200s.", len(failures) - LOGGED_IN_FULL, others
            )
        self._scored, self._failed = self._scored + scored, self._failed + len(failures)
        if failures and self._failed > self.max_failure_share * max(self._scored, 100):
            raise RuntimeError(
                f"The reward failed on {self._failed} of {self._scored} completions, more than the share of "
                f"{self.max_failure_share} allowed; the last was one of prompt {failures[-1][0]}."
            ) from failures[-1][1]

    def _components(self, outcomes: Sequence[Outcome], shape: tuple[int, int]) -> dict[str, Tensor]:
        scored = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
        names = dict.fromkeys(name for outcome in scored for name in outcome)
        self._check_weights(names)
        return {
            name: torch.tensor([self._number(outcome, name) for outcome in outcomes], dtype=torch.float32).view(shape)
            for name in names or self.weights or ["reward"]
        }

    def _number(self, outcome: Outcome, name: str) -> float:
        return self.failure_score if isinstance(outcome, Exception) else outcome.get(name, math.nan)

    def _check_weights(self, names: Mapping[str, None]) -> None:
        """Once, by the first completions that could be scored: later ones may lack a component."""
        unknown = set(self.weights or ()) - set(names)
        if names and unknown and not self._weights_are_checked:
            raise ValueError(
                f"`weights` names components that the score function did not return: {sorted(unknown)}; it "
                f"returns {sorted(names)}."
            )
        self._weights_are_checked = self._weights_are_checked or bool(names)

    def _total(self, components: Mapping[str, Tensor]) -> Tensor:
        weights = self.weights if self.weights is not None else dict.fromkeys(components, 1.0)
        present = {name: weight for name, weight in weights.items() if name in components}
        zero = torch.zeros_like(next(iter(components.values())))
        return sum((weight * components[name].nan_to_num(0.0) for name, weight in present.items()), zero)


def _check_picklable(call: Callable[..., Any]) -> None:
    try:
        pickle.dumps(call)
    except Exception as error:  # pickling runs foreign code, which may raise anything
        raise ValueError(
            f"`score` must be picklable to be called in worker processes: {error}. Define it at the top level of a "
            "module, or as a class with __call__."
        ) from error
