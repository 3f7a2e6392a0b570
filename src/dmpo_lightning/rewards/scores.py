"""What a reward says of completions: the facts that training and evaluation go on from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
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

    failed: Bool[Tensor, "batch group"] | None = None
    """Which of them could not be scored."""

    @property
    def named(self) -> dict[str, Float[Tensor, "batch group"]]:
        """All by name: ``reward``, its components and ``accuracy``.

        A score function that returns a bare number has a component ``reward``, which takes the total's place. The
        accuracy of a failed completion is 0, whatever it scores.
        """
        values = {"reward": self.total, **self.components}
        if "accuracy" not in values:
            # Completions of a later call may lack it.
            values["accuracy"] = values.get(self.accuracy, torch.full_like(self.total, math.nan))
            if self.failed is not None and self.accuracy != "reward":
                values["accuracy"] = values["accuracy"].masked_fill(self.failed, 0.0)
        return values


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
