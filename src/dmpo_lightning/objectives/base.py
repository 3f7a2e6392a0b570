"""What an objective is: targets from whole groups once per buffer, then a loss per micro-batch."""

from abc import ABC, abstractmethod

from torch import Tensor

from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows, Rollouts

Targets = dict[str, Tensor]
"""Named tensors ``[batch group ...]``; flattened over the first two axes for a micro-batch."""
Diagnostics = dict[str, Tensor]
"""Named scalars to log."""


class Objective(ABC):
    """Weights and loss. All it may know is in the rollouts; see `WDCE` for the usual one."""

    def validate(self, *, group_size: int, completion_length: int, sampler: object) -> None:  # noqa: B027  optional hook
        """Raises ValueError where the objective cannot work with these."""

    @abstractmethod
    def prepare(self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int) -> tuple[Targets, Diagnostics]:
        """Targets of whole groups, once per buffer; without gradient, in eval mode (the caller provides both)."""

    def before_step(  # noqa: B027  optional hook
        self, policy: Policy, rollouts: Rollouts, targets: Targets, groups: slice, *, rows_per_forward: int
    ) -> None:
        """Once per optimizer step, before its micro-batches: may renew targets of these whole groups, in place."""

    @abstractmethod
    def loss(
        self, policy: Policy, rows: RolloutRows, targets: Targets, *, iteration: int, planned_rollouts: int
    ) -> tuple[Tensor, Diagnostics]:
        """The loss of one micro-batch of rollouts; ``iteration`` counts the passes over the buffer and keys fresh
        masks.
        """
