"""The reward of a mixture of tasks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmpo_lightning.rewards.reward import AnswerCheck, Reward, Scores
from dmpo_lightning.tasks.base import Example, Verdict


class MixtureReward(Reward):
    """Scores each example as its task does; what a task does not have is NaN, not applicable.

    Args:
        rewards: by the name of the task, which an example holds as ``task``. If each has an answer check, so has the
            mixture.
    """

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        checks = {name: reward.verify for name, reward in rewards.items() if reward.verify is not None}
        verify = _CheckOfTask(checks) if set(checks) == set(rewards) else None
        super().__init__(self._score_one, accuracy="accuracy", verify=verify)
        self.rewards = dict(rewards)

    def parts(self, examples: Sequence[Example]) -> dict[str, tuple[Reward, list[int]]]:
        rows: dict[str, list[int]] = {}
        for row, example in enumerate(examples):
            rows.setdefault(example["task"], []).append(row)
        return {name: (self.rewards[name], places) for name, places in rows.items()}

    def __call__(
        self,
        examples: Sequence[Example],
        completions: Sequence[Sequence[str]],
        prompt_ids: Sequence[int] | None = None,
    ) -> Scores:
        """As `Reward` does it, task by task; components are named ``task/component``, and ``task/reward`` and
        ``task/accuracy`` are among them.
        """
        ids = range(len(examples)) if prompt_ids is None else prompt_ids
        total = torch.zeros(len(examples), len(completions[0]), dtype=torch.float32)
        components: dict[str, Tensor] = {"accuracy": torch.zeros_like(total)}
        failures = 0
        for name, (reward, rows) in self.parts(examples).items():
            scores = reward(
                [examples[row] for row in rows], [completions[row] for row in rows], [ids[row] for row in rows]
            )
            own = {**scores.components, "reward": scores.total}
            own["accuracy"] = own.get(reward.accuracy, torch.zeros_like(scores.total))
            for component, values in own.items():
                components.setdefault(f"{name}/{component}", torch.full_like(total, math.nan))[rows] = values
            total[rows], components["accuracy"][rows] = scores.total, own["accuracy"]
            failures += scores.failures
        return Scores(components, total, failures)

    def _score_one(self, example: Example, completion: str) -> Any:
        return self.rewards[example["task"]].score(example, completion)  # type: ignore[arg-type]

    def close(self) -> None:
        for reward in self.rewards.values():
            reward.close()


@dataclass(frozen=True)
class _CheckOfTask:
    checks: Mapping[str, AnswerCheck]

    def __call__(self, example: Example, completion: str) -> Verdict:
        return self.checks[example["task"]](example, completion)
