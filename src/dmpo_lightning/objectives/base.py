"""What an objective has to provide: targets from whole groups, once per buffer, and a loss per micro-batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Shaped
from torch import Tensor

from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows, Rollouts
from dmpo_lightning.samplers import Sampler

Targets = dict[str, Tensor]
"""Named tensors ``[batch group ...]``. A micro-batch gets some rows of them, flattened over the first two axes."""
Diagnostics = dict[str, Tensor]
"""Scalars to log, by the names under which they are logged."""


def score_rollouts(
    score: Callable[[RolloutRows], Tensor], rollouts: Rollouts, rows_per_forward: int
) -> Shaped[Tensor, "batch group *rest"]:
    """What ``score`` returns for all rollouts, called with at most ``rows_per_forward`` of them at a time."""
    rows = rollouts.rows()
    parts = [score(rows[start : start + rows_per_forward]) for start in range(0, len(rows), rows_per_forward)]
    return torch.cat(parts).unflatten(0, rollouts.group_shape)


class Objective(ABC):
    """Turns rollouts into weights and a loss. All that it may know is in the rollouts. `WDCE` is the usual one.

    Example:
        >>> import torch
        >>> from dmpo_lightning import Objective
        >>> class Imitation(Objective):
        ...     def prepare(self, policy, rollouts, *, rows_per_forward):
        ...         return {"reward": rollouts.reward}, {}
        ...     def loss(self, policy, rows, targets, *, iteration, planned_rollouts):
        ...         masks = torch.ones_like(rows.completion_ids, dtype=torch.bool)[:, None]
        ...         scored = policy.completion_log_probs(rows.prompt_ids, rows.prompt_mask, rows.completion_ids, masks)
        ...         return -(targets["reward"] * scored.mean((1, 2))).sum() / planned_rollouts, {}
        >>> objective = Imitation()
    """

    def validate(self, *, group_size: int, sampler: Sampler) -> None:  # noqa: B027  optional hook
        """Raises ValueError where the objective cannot work with such groups or sampler."""

    @abstractmethod
    def prepare(self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int) -> tuple[Targets, Diagnostics]:
        """Works out the targets of whole groups, once per buffer. The caller provides eval mode and ``no_grad``."""

    def before_step(  # noqa: B027  optional hook
        self, policy: Policy, rollouts: Rollouts, targets: Targets, groups: slice, *, rows_per_forward: int
    ) -> None:
        """May refresh the targets of ``groups`` in place. Called once per optimizer step, before its micro-batches."""

    @abstractmethod
    def loss(
        self, policy: Policy, rows: RolloutRows, targets: Targets, *, iteration: int, planned_rollouts: int
    ) -> tuple[Tensor, Diagnostics]:
        """The loss of one micro-batch, and what to log of it.

        ``iteration`` counts the passes over the buffer and keys fresh masks for each. The loss is divided by
        ``planned_rollouts``, whatever the number of rows that are left.
        """
