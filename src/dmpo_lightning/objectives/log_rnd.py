"""Estimators of completion log-probs, and of log_rnd = log p_ref - log p_old from them."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional import (
    Purpose,
    check_replicates,
    draw_masks,
    elbo,
    fold_in,
    trajectory_log_prob,
    trajectory_masks,
)
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows, Rollouts


class LogProbEstimator(ABC):
    """Log-probs of rollouts under the current or the reference policy, from randomness that is fixed per rollout.

    Fixed, so that the two sides of a difference share their masks: they are drawn again from the rollout's key, not
    stored.
    """

    def validate(self, sampler: object) -> None:  # noqa: B027  optional hook
        """Raises ValueError where the estimate means nothing for rollouts of this sampler."""

    @abstractmethod
    def rows_log_prob(self, policy: Policy, rows: RolloutRows, *, reference: bool) -> Float[Tensor, " rows"]:
        """Estimates in nats for a chunk of rollouts."""

    def log_prob(
        self, policy: Policy, rollouts: Rollouts, *, reference: bool = False, rows_per_forward: int
    ) -> Float[Tensor, "batch group"]:
        """Estimates in nats for all rollouts, in chunks."""
        rows = rollouts.rows()
        chunks = range(0, len(rows), rows_per_forward)
        parts = [
            self.rows_log_prob(policy, rows[start : start + rows_per_forward], reference=reference) for start in chunks
        ]
        return torch.cat(parts).view(rollouts.group_shape)

    def behaviour_log_prob(
        self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int
    ) -> Float[Tensor, "batch group"]:
        """log p_old in nats; the behaviour policy is ``policy`` as it is when its rollouts were just collected."""
        return self.log_prob(policy, rollouts, rows_per_forward=rows_per_forward)

    def log_rnd(self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int) -> Float[Tensor, "batch group"]:
        """log p_ref - log p_old in nats; exactly zero, without a forward, while the reference is the policy itself."""
        if policy.reference_is_current:
            return torch.zeros_like(rollouts.reward)
        behaviour = self.behaviour_log_prob(policy, rollouts, rows_per_forward=rows_per_forward)
        return self.log_prob(policy, rollouts, reference=True, rows_per_forward=rows_per_forward) - behaviour


class ElboEstimator(LogProbEstimator):
    """Monte Carlo ELBO on ``samples`` random maskings.

    Unbiased for the ELBO; assumes rollouts at T = 1, so a lower sampling temperature aims a little beside the target.

    Raises:
        ValueError: fewer than one sample, or an odd number with antithetic pairs.
    """

    def __init__(self, samples: int = 4, *, antithetic: bool = True) -> None:
        check_replicates(samples, antithetic=antithetic, name="samples")
        self.samples, self.antithetic = samples, antithetic

    def rows_log_prob(self, policy: Policy, rows: RolloutRows, *, reference: bool) -> Float[Tensor, " rows"]:
        masks = draw_masks(
            fold_in(rows.keys, Purpose.ELBO),
            length=rows.completion_ids.shape[1],
            replicates=self.samples,
            antithetic=self.antithetic,
        )
        return elbo(
            policy.completion_log_probs(
                rows.prompt_ids, rows.prompt_mask, rows.completion_ids, masks, reference=reference
            ),
            masks,
        )


class TrajectoryEstimator(LogProbEstimator):
    """log p(completion | order), exact along the order in which a random-order sampler revealed the tokens, at its
    temperature. The order is replayed for the reference several steps at a time.

    Args:
        steps_per_forward: of each rollout; 4 cost a forward what four maskings of an ELBO do.

    Raises:
        ValueError: fewer than one.
    """

    def __init__(self, steps_per_forward: int = 4) -> None:
        if steps_per_forward < 1:
            raise ValueError(f"`steps_per_forward` must be at least 1, got {steps_per_forward}.")
        self.steps_per_forward = steps_per_forward

    def validate(self, sampler: object) -> None:
        if not getattr(sampler, "order_is_independent", False):
            raise ValueError(
                f"Trajectory log-probs need a sampler whose order ignores the tokens, got {sampler!r}; use "
                f"RandomOrderSampler or an "
                "ElboEstimator."
            )
        if getattr(sampler, "temperature", 1.0) == 0:
            raise ValueError(
                "Trajectory log-probs need a sampling `temperature` above 0, got 0: greedy samples have no density."
            )

    def rows_log_prob(self, policy: Policy, rows: RolloutRows, *, reference: bool) -> Float[Tensor, " rows"]:
        steps = int(rows.reveal_step.max()) + 1
        total = torch.zeros(len(rows), dtype=torch.float32, device=rows.keys.device)
        for first in range(0, steps, self.steps_per_forward):
            masks, revealed = trajectory_masks(
                rows.reveal_step, range(first, min(first + self.steps_per_forward, steps))
            )
            log_prob = policy.completion_log_probs(
                rows.prompt_ids,
                rows.prompt_mask,
                rows.completion_ids,
                masks,
                at=revealed,
                reference=reference,
                temperature=rows.temperature,
            )
            total += trajectory_log_prob(log_prob, revealed)
        return total

    def behaviour_log_prob(
        self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int
    ) -> Float[Tensor, "batch group"]:
        """Was recorded while sampling; only the reference has to replay the order."""
        return rollouts.sampled_log_prob.sum(-1)
