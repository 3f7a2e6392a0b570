"""From completions to reward tensors: named components, weights, and completions on which scoring fails."""

import copy
import logging
import math
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmpo_lightning.rewards.functions import (
    LARGEST,
    TAKES,
    BatchJudge,
    BatchScoreFunction,
    Check,
    Judge,
    Judgement,
    PromiseError,
    ScoreError,
    ScoreFunction,
    call_each,
    check_function,
)
from dmpo_lightning.rewards.scores import Scores
from dmpo_lightning.tasks.base import Example, Share, Task, Verdict
from dmpo_lightning.terminal import show_traceback
from dmpo_lightning.workers import CallError, WorkerPool

logger = logging.getLogger(__name__)
# What was raised often holds a part of the completion.
logger.addFilter(show_traceback)

MOST_KINDS = 10
"""Different errors whose cause is logged. Of all others only the number is."""


class Reward:
    """A score function with weights for its components, and perhaps a check of the answer.

    A completion fails if scoring or checking it raises, takes longer than the time limit, ends its worker, or gives
    anything but numbers of at most 1e30. It is counted, gets ``failure_score``, and is not correct. The first failure
    of a kind is logged with its cause and the index of its prompt, and later ones are a number (`tell_failures`).

    Args:
        score: from an example and a completion to a number, or to named components (a task's ``score``, for one).
            Several functions become one by `CombinedScore`.
        weights: of the components in the reward, those of the check (``correct`` and its share) included. None takes
            each of the score function's with weight 1. Components without a weight are only logged.
        accuracy: the component reported as accuracy. None takes the reward itself. If the score has no such component
            it is ``correct`` of the check.
        max_failure_share: of all completions scored so far, counting at least 100. Above it the last error stops the
            run.
        failure_score: of a failed completion, in every component that the others have of the score function, and of
            the check in the reward alone.
        batched: whether ``score`` takes equally long lists of examples and completions instead, and returns one result
            for each. If it raises, all of them fail.
        workers: processes that score, for which ``score`` must be picklable. 0 scores in this one.
        time_limit: seconds for one call of ``score`` and ``check``, in workers only, with what the call itself imports.
            A call that takes longer is killed.
        check: from an example and a completion to a `Verdict`, which is reported beside the score. It reads completions
            with their special tokens where these are given.

    Raises:
        ValueError: a time limit without workers, several workers for batched scoring, a score function that cannot be
            pickled, a class, or a function of other arguments, of Python itself, or that has yet to be awaited. At the
            first call: weights or an accuracy of a component that there is not, and what has yet to be awaited.

    Example:
        >>> from dmpo_lightning import Reward
        >>> def score(example, completion):
        ...     return {"right": float(completion == example["answer"]), "brief": 1 - len(completion) / 10}
        >>> reward = Reward(score, weights={"right": 1.0, "brief": 0.5})
        >>> reward([{"answer": "4"}], [["4", "four"]]).total
        tensor([[1.4500, 0.3000]])
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
        check: Check | None = None,
    ) -> None:
        for option, function in {"score": score, "check": check}.items():
            if function is not None:
                check_function(option, function, TAKES, may_yield=batched and option == "score")
        if not 0 <= max_failure_share <= 1:
            raise ValueError(f"`max_failure_share` must be in [0, 1], got {max_failure_share}.")
        # A NaN is not smaller either.
        if not all(abs(number) <= LARGEST for number in (failure_score, *(weights or {}).values())):
            raise ValueError(
                f"`weights` and `failure_score` must be finite, and at most {LARGEST:g}, got {weights} and "
                f"{failure_score}."
            )
        if time_limit is not None and not workers:
            raise ValueError(
                f"`time_limit` {time_limit} needs worker processes, which can be killed; pass `workers=1` or more."
            )
        if batched and workers > 1:
            raise ValueError(f"`batched` scoring is one call, which one worker makes; got `workers={workers}`, pass 1.")
        self.score, self.check, self.batched = score, check, batched
        self.weights, self.accuracy = weights, accuracy or "reward"
        self.max_failure_share, self.failure_score = max_failure_share, failure_score
        self.workers, self.time_limit = workers, time_limit
        self._scored = self._failed = self._told = 0
        self._kinds: set[str] = set()
        """The errors that were logged, without their numbers."""
        self._names: list[str] = []
        """The components of the first completions that could be scored. Those of a call that all fail have them too."""
        self._share: Share | None = None
        """One that the check has given."""
        self._start()

    def _start(self) -> None:
        """Puts score and check together, where they are called."""
        self._judge = BatchJudge(self.score, self.check) if self.batched else Judge(self.score, self.check)  # type: ignore[arg-type]
        self._pool = None
        if self.workers:
            self._pool = WorkerPool(self._judge, workers=self.workers, time_limit=self.time_limit)
            try:
                pickle.dumps(self._judge)
            # Pickling runs foreign code, which may raise anything.
            except Exception as error:
                raise ValueError(
                    f"`score` must be picklable to be called in worker processes: {error}. Define it at the top level "
                    "of a module, or as a class with __call__."
                ) from error

    @classmethod
    def of_task(cls, task: Task, weights: Mapping[str, float] | None = None, **options: Any) -> "Reward":
        """The reward of a task's own components, with its check if it has one, and any further ``options``.

        Without weights it takes those that the task itself states.
        """
        return cls(
            task.score,
            weights=task.reward_weights if weights is None else weights,
            accuracy=task.accuracy or ("correct" if task.has_check else None),
            check=task.check if task.has_check else None,
            **options,
        )

    def __call__(
        self,
        examples: Sequence[Example],
        completions: Sequence[Sequence[str]],
        prompt_index: Sequence[int] | None = None,
        *,
        raw: Sequence[Sequence[str]] | None = None,
    ) -> Scores:
        """Scores ``completions[i][j]``, the j-th rollout of ``examples[i]``.

        Args:
            examples: one per prompt.
            completions: texts without special tokens, equally many for each prompt.
            prompt_index: positions in the data set, by which failures are named in the log.
            raw: the same completions with their special tokens, for the check. None has it read ``completions``.

        Raises:
            RuntimeError: more failures than allowed, or workers that cannot start.
        """
        numbers = range(len(examples)) if prompt_index is None else prompt_index
        groups = zip(examples, completions, raw or completions, numbers, strict=True)
        rows = [(index, (example, *both)) for example, *texts, index in groups for both in zip(*texts, strict=True)]
        calls: list[tuple[Any, ...]] = [row for _, row in rows]
        if self.batched and calls:
            calls = [tuple(zip(*calls, strict=True))]
        results = call_each(self._judge, calls) if self._pool is None else self._pool.map(calls)
        judged = self._of_each(results, len(rows))
        for each in judged:
            if isinstance(each, PromiseError):
                raise ValueError(f"{each}.")
        failed = [(index, each) for (index, _), each in zip(rows, judged, strict=True) if isinstance(each, ScoreError)]
        self._count(failed, len(rows))
        return self._scores(judged, (len(examples), len(completions[0]) if completions else 0))

    def tell_failures(self) -> None:
        """Logs how many completions have failed so far, if there are more than was told. Called once per buffer."""
        if self._failed > self._told:
            self._told = self._failed
            logger.warning("The reward has failed on %d of %d completions so far.", self._failed, self._scored)

    @property
    def name(self) -> str:
        """What scores, for reports."""
        return str(getattr(self.score, "__qualname__", type(self.score).__name__))

    def with_check_of(self, other: "Reward") -> "Reward":
        """This reward with the check and the accuracy of another."""
        checked = copy.copy(self)
        checked.check, checked.accuracy = other.check, other.accuracy
        checked._start()
        return checked

    def close(self) -> None:
        """Ends the worker processes, which otherwise end with the interpreter. The next call starts new ones."""
        if self._pool is not None:
            self._pool.close()

    def _of_each(self, results: list[Any], count: int) -> "list[Judgement | ScoreError]":
        """What is said of each completion, of what the calls gave."""
        results = [ScoreError.of(each) if isinstance(each, CallError) else each for each in results]
        if not self.batched or not count:
            return results
        (result,) = results
        return [result] * count if isinstance(result, ScoreError) else result

    def _count(self, failures: Sequence[tuple[int, ScoreError]], scored: int) -> None:
        for index, error in failures:
            kind = re.sub(r"\d+", "", str(error))
            if kind in self._kinds or len(self._kinds) == MOST_KINDS:
                continue
            self._kinds.add(kind)
            self._told += 1
            logger.warning(
                "The reward failed on a completion of prompt %d, which scores %g: %s",
                index,
                self.failure_score,
                error,
                exc_info=error.__cause__ or error,
            )
        self._scored, self._failed = self._scored + scored, self._failed + len(failures)
        # Of a hundred at least, or the first failure of a run would end it.
        if failures and self._failed > self.max_failure_share * max(self._scored, 100):
            index, error = failures[-1]
            raise RuntimeError(
                f"The reward failed on {self._failed} of {self._scored} completions, more than the share of "
                f"{self.max_failure_share} allowed; the last was one of prompt {index}: {error!s:.300}"
            ) from (error.__cause__ or error)

    def _scores(self, judged: Sequence[Judgement | ScoreError], shape: tuple[int, int]) -> Scores:
        """Tensors of what is said of each completion, whose shape is prompts and rollouts."""
        failed = torch.tensor([isinstance(each, ScoreError) for each in judged], dtype=torch.bool).view(shape)

        def filled(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: values.masked_fill(failed, self.failure_score) for name, values in table.items()}

        own = filled(self._table([{} if isinstance(each, ScoreError) else each.numbers for each in judged], shape))
        components, accuracy, verdicts = own, self.accuracy, None
        if self.check is not None:
            said = [None if isinstance(each, ScoreError) else each.verdict for each in judged]
            self._share = next((each.share for each in said if each and each.share), self._share)
            verdicts = [self._answered(said[row * shape[1] : (row + 1) * shape[1]]) for row in range(shape[0])]
            if said:
                components = own | self._table([each.components for group in verdicts for each in group], shape)
            accuracy = accuracy if accuracy in ("reward", *components) else "correct"
        if not self._names and not failed.all():
            self._names = list(own)
            self._check_names(components, accuracy)
        # Weights may be of the check alone, by whose components a failed completion is merely not correct.
        total = self._total(filled(components), own)
        return Scores(components, total, int(failed.sum()), accuracy, verdicts, failed=failed)

    def _answered(self, said: Sequence[Verdict | None]) -> list[Verdict]:
        """The verdicts on a prompt's completions. One that failed has none of as many parts right."""
        known = [verdict for verdict in said if verdict is not None]
        share = known[0].share if known else self._share
        wrong = Verdict(None, False, share and replace(share, right=0))
        return [wrong if verdict is None else verdict for verdict in said]

    def _table(self, rows: Sequence[Mapping[str, float]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Components by name. What a completion does not have is NaN."""
        names = dict.fromkeys(name for row in rows for name in row)
        return {
            name: torch.tensor([row.get(name, math.nan) for row in rows], dtype=torch.float32).view(shape)
            # Where every completion failed, none of them has named a component.
            for name in names or self._names or self.weights or ["reward"]
        }

    def _check_names(self, names: Iterable[str], accuracy: str) -> None:
        """Asked once, since later completions may lack a component."""
        for option, used in {"weights": self.weights or (), "accuracy": {accuracy} - {"reward"}}.items():
            if unknown := set(used) - set(names):
                raise ValueError(
                    f"`{option}` names components that the score function did not return: {sorted(unknown)}; it "
                    f"returns {sorted(names)}."
                )

    def _total(self, components: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum. Without weights it is that of the score function's own components."""
        table, weights = (own, dict.fromkeys(own, 1.0)) if self.weights is None else (components, self.weights)
        # NaN is a component that a completion does not have, and adds nothing.
        terms = (weight * table[name].nan_to_num(0.0) for name, weight in weights.items() if name in table)
        return sum(terms, torch.zeros_like(next(iter(own.values()))))
