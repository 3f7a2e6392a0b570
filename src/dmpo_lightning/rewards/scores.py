"""What a reward says of completions: the facts that training and evaluation go on from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.tasks.base import Verdict


@dataclass
class Scores:
    """Components and their weighted sum, for each rollout of each prompt."""

    components: dict[str, Float[Tensor, "batch group"]]
    """NaN where a completion has no such component, as in a mixture of tasks."""
    total: Float[Tensor, "batch group"]
    """Over the components that a completion has."""
    failures: int
    """Completions that could not be scored. Each got the failure score in every component of the score function."""
    accuracy: str = "reward"
    """The component that is reported as accuracy. ``reward`` is the total."""
    verdicts: list[list[Verdict]] | None = None
    """What the check says, where there is one."""
    parts: dict[str, "Scores"] = field(default_factory=dict)
    """Of a mixture, the scores of each task under its own names. Empty where there is one task."""
    rows: dict[str, list[int]] = field(default_factory=dict)
    """The positions of each task's prompts in the batch."""

    @property
    def named(self) -> dict[str, Float[Tensor, "batch group"]]:
        """All by name: ``reward``, its components and ``accuracy``.

        A score function that returns a bare number has a component ``reward``, which takes the total's place.

        Raises:
            ValueError: the accuracy is none of the components.
        """
        values = {"reward": self.total, **self.components}
        if "accuracy" in values:
            return values
        # Where every completion failed, none of them has named a component.
        if self.accuracy not in values and self.failures < self.total.numel():
            raise ValueError(f"`accuracy` {self.accuracy!r} is none of the reward's components: {sorted(values)}.")
        return values | {"accuracy": values.get(self.accuracy, torch.zeros_like(self.total))}


def named_by_task(
    tables: Mapping[str, Mapping[str, Tensor]], rows: Mapping[str, Sequence[int]], prompts: int
) -> dict[str, Tensor]:
    """Each task's values as ``task/name`` over all prompts, NaN in the rows of other tasks.

    This is the only place where such names are made. Call it where numbers leave for a log or a report, and hand on
    `Scores.parts` until then.
    """
    named: dict[str, Tensor] = {}
    for task, values in tables.items():
        for name, value in values.items():
            spread = value.new_full((prompts, *value.shape[1:]), math.nan)
            spread[list(rows[task])] = value
            named[f"{task}/{name}"] = spread
    return named
