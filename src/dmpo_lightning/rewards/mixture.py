"""The reward of a mixture of tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rewards.scores import Scores, named_by_task
from dmpo_lightning.tasks.base import Example, Verdict


class MixtureReward(Reward):
    """Scores each example as its task does. What a task does not have is NaN, not applicable.

    Args:
        rewards: by the name of the task, which an example holds as ``task``. If each has a check, so has the mixture.
    """

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        has_check = all(reward.check is not None for reward in rewards.values())
        super().__init__(self._score_one, accuracy="accuracy", check=self._check_one if has_check else None)
        self.rewards = dict(rewards)

    def __call__(
        self,
        examples: Sequence[Example],
        completions: Sequence[Sequence[str]],
        prompt_index: Sequence[int] | None = None,
        *,
        raw: Sequence[Sequence[str]] | None = None,
    ) -> Scores:
        """As `Reward` does it, task by task.

        The scores of each task are in ``parts``. Components are named ``task/component``, and ``task/reward`` and
        ``task/accuracy`` are among them. There are verdicts if every task has a check.
        """
        numbers = range(len(examples)) if prompt_index is None else prompt_index
        rows: dict[str, list[int]] = {}
        for row, example in enumerate(examples):
            rows.setdefault(self._task_of(example), []).append(row)
        parts = {
            task: self.rewards[task](
                [examples[row] for row in own],
                [completions[row] for row in own],
                [numbers[row] for row in own],
                raw=[(raw or completions)[row] for row in own],
            )
            for task, own in rows.items()
        }
        return _joined(parts, rows, has_verdicts=self.check is not None)

    def _score_one(self, example: Example, completion: str) -> Any:
        return self.rewards[self._task_of(example)].score(example, completion)  # type: ignore[arg-type]

    def _check_one(self, example: Example, completion: str) -> Verdict:
        check = self.rewards[self._task_of(example)].check
        assert check is not None
        verdict: Verdict = check(example, completion)
        return verdict

    def _task_of(self, example: Example) -> str:
        task = example.get("task") if isinstance(example, Mapping) else None
        # A list, say, could not even be looked up.
        if not isinstance(task, str) or task not in self.rewards:
            raise ValueError(
                f"An example in a mixture must hold `task`, one of {sorted(self.rewards)}, got {task!r}; give it the "
                "name of its task, or take the prompts from MixtureDataModule."
            )
        return task

    def tell_failures(self) -> None:
        for reward in self.rewards.values():
            reward.tell_failures()

    def close(self) -> None:
        for reward in self.rewards.values():
            reward.close()


def _joined(parts: dict[str, Scores], rows: dict[str, list[int]], *, has_verdicts: bool) -> Scores:
    """The scores of all prompts, put together from those of each task."""
    count = sum(map(len, rows.values()))
    total, accuracy = torch.zeros(2, count, next(iter(parts.values())).total.shape[1], dtype=torch.float32)
    verdicts: dict[int, list[Verdict]] = {}
    for task, part in parts.items():
        # A mixture calls the weighted sum `reward`; a component of that name would stand in its place.
        part.components.pop("reward", None)
        total[rows[task]], accuracy[rows[task]] = part.total, part.named["accuracy"]
        verdicts |= zip(rows[task], part.verdicts or (), strict=False)
    named = named_by_task({task: part.named for task, part in parts.items()}, rows, count)
    return Scores(
        {"accuracy": accuracy} | named,
        total,
        sum(part.failures for part in parts.values()),
        accuracy="accuracy",
        verdicts=[verdicts[row] for row in range(count)] if has_verdicts else None,
        parts=parts,
        rows=rows,
    )
