"""From completions to reward tensors: named components, weights, and completions on which scoring fails."""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmpo_lightning.rewards.functions import attempt, check_function, check_picklable
from dmpo_lightning.rewards.score_functions import (
    LARGEST,
    TAKES,
    BatchScore,
    BatchScoreFunction,
    OneScore,
    ScoreFunction,
)
from dmpo_lightning.rewards.scores import Scores
from dmpo_lightning.tasks.base import Example, Task, Verdict
from dmpo_lightning.terminal import show_traceback
from dmpo_lightning.workers import WorkerPool

logger = logging.getLogger(__name__)
# What was raised often holds a part of the completion.
logger.addFilter(show_traceback)

LOGGED_IN_FULL = 3
"""Failures of one call whose cause is logged. Of the others only the number is."""

AnswerCheck = Callable[[Example, str], Any]
"""Returns a `Verdict`. A return type here would refuse functions without annotations on the command line."""
Outcome = dict[str, float] | Exception


class Reward:
    """A score function with weights for its components.

    A completion fails if scoring it raises, takes longer than the time limit, ends its worker, or gives anything but
    numbers of at most 1e30, of which single precision can take the sum. It is logged with its prompt id, counted, and
    gets ``failure_score``.

    Args:
        score: from an example and a completion to a number, or to named components (a task's ``score``, for one).
            Several functions become one by `CombinedScore`.
        weights: of the components in the reward. None takes each with weight 1. Components without a weight are only
            logged.
        accuracy: the component reported as accuracy. None takes the reward itself.
        max_failure_share: of all completions scored so far, counting at least 100. Above it the last error stops the
            run.
        failure_score: of a failed completion, in every component that the others have.
        batched: whether ``score`` takes equally long lists of examples and completions instead, and returns one result
            for each. If it raises, all of them fail.
        workers: processes that score, for which ``score`` must be picklable. 0 scores in this one.
        time_limit: seconds for one call of ``score``, in workers only. A call that takes longer is killed.
        verify: the answer check of an evaluation, which reads completions with their special tokens. None has the score
            alone decide.
        unchecked_score: ``score`` without the components that ``verify`` gives. An evaluation calls it instead, so that
            the answer check runs once per completion, unless the reward counts such a component. None always calls
            ``score``.
        share_name: of the component that holds the share in the verdicts of ``verify``. Without a name it is left out.

    Raises:
        ValueError: a time limit without workers, several workers for batched scoring, a score function that cannot be
            pickled. At the first call: weights for a component that the score function does not return.
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
        unchecked_score: ScoreFunction | None = None,
        share_name: str | None = None,
    ) -> None:
        for option, function in {"score": score, "verify": verify, "unchecked_score": unchecked_score}.items():
            if function is not None:
                check_function(option, function, TAKES)
        # A NaN is not smaller either.
        if not abs(failure_score) <= LARGEST:
            raise ValueError(f"`failure_score` must be finite, and at most {LARGEST:g}, got {failure_score}.")
        if not 0 <= max_failure_share <= 1:
            raise ValueError(f"`max_failure_share` must be in [0, 1], got {max_failure_share}.")
        for name, weight in (weights or {}).items():
            if not abs(weight) * max(abs(failure_score), 1) <= LARGEST:
                raise ValueError(f"`weights` must be finite, and at most {LARGEST:g}, got {weight} for {name!r}.")
        if time_limit is not None and not workers:
            raise ValueError(
                f"`time_limit` {time_limit} needs worker processes, which can be killed; pass `workers=1` or more."
            )
        if batched and workers > 1:
            raise ValueError(f"`batched` scoring is one call, which one worker makes; got `workers={workers}`, pass 1.")
        self.score, self.weights, self.accuracy = score, weights, accuracy or "reward"
        self.max_failure_share, self.failure_score = max_failure_share, failure_score
        self.verify, self.share_name = verify, share_name
        self.batched = batched
        # The reward is that of the text without special tokens even in an evaluation. Where it counts what the answer
        # check says, the check has two texts to read.
        counts_check = weights is None or not {"correct", share_name}.isdisjoint(weights)
        one = OneScore(score, score if counts_check or unchecked_score is None else unchecked_score)  # type: ignore[arg-type]
        self._call: Callable[..., Any] = BatchScore(score) if batched else one  # type: ignore[arg-type]
        self._pool = None if workers == 0 else WorkerPool(self._call, workers=workers, time_limit=time_limit)
        if workers:
            check_picklable(self._call)
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
        """The reward of a task's own components, with its answer check if it has one.

        Without weights it takes those that the task itself states.
        """
        return cls(
            task.score,
            weights=task.reward_weights if weights is None else weights,
            accuracy=task.accuracy,
            max_failure_share=max_failure_share,
            failure_score=failure_score,
            workers=workers,
            time_limit=time_limit,
            verify=task.verify if task.has_answer_check else None,
            unchecked_score=task.unchecked_score if task.has_answer_check else None,
            share_name=task.share_name,
        )

    def __call__(
        self,
        examples: Sequence[Example],
        completions: Sequence[Sequence[str]],
        prompt_ids: Sequence[int] | None = None,
        *,
        raw: Sequence[Sequence[str]] | None = None,
    ) -> Scores:
        """Scores ``completions[i][j]``, the j-th rollout of ``examples[i]``.

        Args:
            examples: one per prompt.
            completions: texts without special tokens, equally many for each prompt.
            prompt_ids: name failures in the log.
            raw: in an evaluation, the same completions with their special tokens. The answer check reads these, once
                each. What it says takes the place of the components of the same names.

        Raises:
            RuntimeError: more failures than allowed, or workers that cannot start.
        """
        ids = range(len(examples)) if prompt_ids is None else prompt_ids
        checked = None if self.verify is None else raw
        rows = [
            (number, example, text)
            for example, texts, number in zip(examples, completions, ids, strict=True)
            for text in texts
        ]
        outcomes = self._outcomes([(example, text) for _, example, text in rows], with_check=checked is None)
        outcomes = [self._bounded(outcome) for outcome in outcomes]
        self._count([(rows[i][0], each) for i, each in enumerate(outcomes) if isinstance(each, Exception)], len(rows))
        components = self._components(outcomes, (len(examples), len(completions[0]) if completions else 0))
        # Of the scored text, before the answer check's components take their place.
        total = self._total(components)
        verdicts = None
        if checked is not None:
            prompts = zip(examples, checked, ids, strict=True)
            verdicts = [[self.check(example, text, number) for text in texts] for example, texts, number in prompts]
            components |= self._checked_components(verdicts)
        failures = sum(isinstance(outcome, Exception) for outcome in outcomes)
        return Scores(components, total, failures, self.accuracy, verdicts, self.share_name)

    @property
    def name(self) -> str:
        """What scores, for reports."""
        return str(getattr(self.score, "__qualname__", type(self.score).__name__))

    def check(self, example: Example, completion: str, prompt_id: int) -> Verdict:
        """The answer check's verdict on a completion with its special tokens.

        A check that raises is logged and counted as scoring that fails is. Nothing was answered then.
        """
        assert self.verify is not None
        verdict = attempt(self.verify, (example, completion))
        if isinstance(verdict, Verdict):
            return verdict
        problem = verdict if isinstance(verdict, Exception) else TypeError(f"no Verdict but {verdict!r}")
        self._count([(prompt_id, problem)], 0)
        return Verdict(None, False)

    def with_check_of(self, other: "Reward") -> "Reward":
        """This reward with the answer check and the accuracy of another.

        If the other's accuracy is none that the check gives, the accuracy is ``correct``.
        """
        checked = copy.copy(self)
        checked.verify, checked.share_name = other.verify, other.share_name
        checked.accuracy = other.accuracy if other.accuracy == other.share_name else "correct"
        return checked

    def close(self) -> None:
        """Ends the worker processes, which otherwise end with the interpreter. The next call starts new ones."""
        if self._pool is not None:
            self._pool.close()

    def _outcomes(self, rows: list[tuple[Example, str]], *, with_check: bool) -> list[Outcome]:
        """The components of each completion or what was raised, here or in the workers."""
        every = [example for example, _ in rows], [text for _, text in rows]
        calls: list[tuple[Any, ...]] = [every] if self.batched else [(*row, with_check) for row in rows]
        results = self._pool.map(calls) if self._pool is not None else [attempt(self._call, call) for call in calls]
        if not self.batched:
            return results
        if isinstance(results[0], Exception):
            return [results[0]] * len(rows)
        return [ValueError(result) if isinstance(result, str) else result for result in results[0]]

    def _bounded(self, outcome: Outcome) -> Outcome:
        """A failure in place of numbers whose weighted sum is too large."""
        weights = self.weights
        if isinstance(outcome, Exception) or weights is None:
            return outcome
        sizes = [abs(weight * outcome.get(name, 0.0)) for name, weight in weights.items()]
        return outcome if sum(sizes) <= LARGEST else ValueError(f"the weighted scores must be at most {LARGEST:g}")

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
        # Of a hundred at least, or the first failure of a run would end it.
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
            # Where every completion failed, none of them has named a component.
            for name in names or self.weights or ["reward"]
        }

    def _checked_components(self, verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Tensor]:
        """What the answer check says, as components. A verdict without a share among others with one has NaN."""
        said = [[verdict.components(self.share_name) for verdict in group] for group in verdicts]
        names = max((each for group in said for each in group), key=len, default={})
        return {
            name: torch.tensor([[each.get(name, math.nan) for each in group] for group in said], dtype=torch.float32)
            for name in names
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
        # NaN is a component that a completion does not have, and adds nothing.
        return sum((weight * components[name].nan_to_num(0.0) for name, weight in present.items()), zero)
