"""What an objective has to provide: targets from whole groups, once per buffer, and a loss per micro-batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows, Rollouts
from dmpo_lightning.samplers.base import Sampler

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


@dataclass(frozen=True)
class MaskedPass:
    """One pass of the model over rollouts, each of which it sees under several maskings.

    Args:
        maskings: maskings of each rollout in one forward.
        positions: positions of each rollout whose log-probs one forward computes, over all its maskings.
        forwards: forwards that see the same rollouts, with other maskings each.
    """

    maskings: int
    positions: float
    forwards: int = 1

    @classmethod
    def over(cls, length: int, *, replicates: int) -> "MaskedPass":
        """With masks as `functional.draw_masks` draws them and log-probs at all that is masked.

        Counts are uniform on 1..length, so (length + 1) / 2 positions are masked per replicate on average. Antithetic
        pairs have exactly that many, because their two counts add up to length + 1.
        """
        return cls(maskings=replicates, positions=replicates * (length + 1) / 2)


@dataclass(frozen=True)
class ObjectiveFootprint:
    """What an objective asks of the model. `dmpo-lightning plan` turns it into forwards and bytes.

    Args:
        training: over the rollouts of each micro-batch, with gradient.
        per_buffer: over all rollouts of a buffer, without gradient, as `Objective.prepare` runs them.
        per_step: over the whole groups of each optimizer step, without gradient, as `Objective.before_step` runs them.
    """

    training: MaskedPass
    per_buffer: tuple[MaskedPass, ...] = ()
    per_step: tuple[MaskedPass, ...] = ()


class Objective(ABC):
    """Turns rollouts into weights and a loss. All that it may know is in the rollouts. `WDCE` is the usual one."""

    def validate(self, *, group_size: int, completion_length: int, sampler: object) -> None:  # noqa: B027  optional hook
        """Raises ValueError where the objective cannot work with such groups, completions or sampler."""

    def footprint(
        self, *, completion_length: int, sampler: Sampler, reference_is_current: bool = False
    ) -> ObjectiveFootprint:
        """What the objective asks of the model, for `dmpo-lightning plan`. Training does not need it.

        ``reference_is_current`` says that the reference equals the policy whenever a buffer is prepared, so that
        log_rnd is zero and costs no forward.

        Raises:
            ValueError: the objective does not say. Nothing can be assumed instead, since the passes of an objective
                may be many or none.
        """
        raise ValueError(
            f"`plan` cannot tell what {type(self).__name__} asks of the model; give it a method "
            "`footprint(self, *, completion_length, sampler, reference_is_current=False)` that returns an "
            "ObjectiveFootprint (see dmpo_lightning.objectives.base)."
        )

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
