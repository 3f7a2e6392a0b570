"""Estimators of the log-probs of completions, and thereby of log_rnd = log p_ref - log p_old."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
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
from dmpo_lightning.objectives.base import score_rollouts
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows, Rollouts, check_counts
from dmpo_lightning.samplers import Sampler


class LogProbEstimator(ABC):
    """Estimates log-probs of rollouts under the current or the reference policy.

    Whatever is random in an estimate is drawn from the rollout's key. It is the same each time, so that the two sides
    of a difference share their masks and most of the noise cancels. The masks are drawn again and never stored.
    """

    def validate(self, sampler: Sampler) -> None:  # noqa: B027  optional hook
        """Raises ValueError where the estimate would mean nothing for rollouts of this sampler."""

    @abstractmethod
    def rows_log_prob(self, policy: Policy, rows: RolloutRows, *, reference: bool) -> Float[Tensor, " rows"]:
        """The estimates, in nats, for a chunk of rollouts that fits into one forward."""

    def log_prob(
        self, policy: Policy, rollouts: Rollouts, *, reference: bool = False, rows_per_forward: int
    ) -> Float[Tensor, "batch group"]:
        """The estimates, in nats, for all rollouts, ``rows_per_forward`` of them at a time."""
        return score_rollouts(
            lambda rows: self.rows_log_prob(policy, rows, reference=reference), rollouts, rows_per_forward
        )

    def behaviour_log_prob(
        self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int
    ) -> Float[Tensor, "batch group"]:
        """Estimates log p_old in nats. This is called right after collecting, while ``policy`` is still the old one."""
        return self.log_prob(policy, rollouts, rows_per_forward=rows_per_forward)

    def log_rnd(self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int) -> Float[Tensor, "batch group"]:
        """Estimates log p_ref - log p_old in nats.

        It is exactly zero, and costs no forward, while the reference is known to equal the policy.
        """
        # The answer is that of all ranks together. A rank that left its forwards out alone would let the others wait.
        if policy.reference_equals_policy():
            return torch.zeros_like(rollouts.reward)
        behaviour = self.behaviour_log_prob(policy, rollouts, rows_per_forward=rows_per_forward)
        return self.log_prob(policy, rollouts, reference=True, rows_per_forward=rows_per_forward) - behaviour


def masked_log_probs(
    policy: Policy,
    rows: RolloutRows,
    keys: Int[Tensor, " rows"],
    *,
    replicates: int,
    antithetic: bool,
    reference: bool = False,
) -> tuple[
    Float[Tensor, "rows replicate length"], Bool[Tensor, "rows replicate length"], Int[Tensor, "rows length"] | None
]:
    """Log-probs under random maskings, which `draw_masks` draws by the ``keys``, then the masks and the model's blocks.

    The three are what `elbo` and the losses take.
    """
    blocks = policy.completion_blocks(rows.prompt_mask, rows.completion_ids)
    length = rows.completion_ids.shape[1]
    masks = draw_masks(keys, length=length, replicates=replicates, antithetic=antithetic, blocks=blocks)
    log_prob = policy.completion_log_probs(
        rows.prompt_ids, rows.prompt_mask, rows.completion_ids, masks, reference=reference
    )
    return log_prob, masks, blocks


class ElboEstimator(LogProbEstimator):
    """Estimates log-probs by a Monte Carlo ELBO on ``samples`` random maskings of each completion.

    The estimate is unbiased for the ELBO. It is of the model at temperature 1, and so assumes rollouts that were
    sampled at 1. With another sampling temperature, weights made of it aim a little beside the target.

    Args:
        samples: maskings of each completion.
        antithetic: draw the maskings in pairs.

    Raises:
        ValueError: there is no sample, or an odd number of them with antithetic pairs.

    Example:
        >>> from dmpo_lightning import WDCE, ElboEstimator
        >>> objective = WDCE(reward_temperature=0.1, estimator=ElboEstimator(samples=8))
    """

    def __init__(self, samples: int = 4, *, antithetic: bool = True) -> None:
        check_replicates(samples, antithetic=antithetic, name="samples")
        self.samples, self.antithetic = samples, antithetic

    def rows_log_prob(self, policy: Policy, rows: RolloutRows, *, reference: bool) -> Float[Tensor, " rows"]:
        # No pass and no step is part of the key. All estimates of a rollout are on the same masks, those of the two
        # sides of log_rnd and the later ones of the `policy` baseline.
        keys = fold_in(rows.keys, Purpose.ELBO)
        return elbo(
            *masked_log_probs(
                policy, rows, keys, replicates=self.samples, antithetic=self.antithetic, reference=reference
            )
        )


class TrajectoryEstimator(LogProbEstimator):
    """Computes log p(completion | order) exactly, along the order in which a random-order sampler revealed the tokens.

    It is taken at the sampler's temperature. The behaviour policy's side was recorded while sampling. For any other
    policy the order is replayed, several steps at a time.

    Args:
        steps_per_forward: how many steps of each rollout share a forward. 4 of them cost what an ELBO on four maskings
            costs.

    Raises:
        ValueError: ``steps_per_forward`` is below 1.

    Example:
        >>> from dmpo_lightning import WDCE, TrajectoryEstimator
        >>> objective = WDCE(reward_temperature=0.1, estimator=TrajectoryEstimator(steps_per_forward=8))
    """

    def __init__(self, steps_per_forward: int = 4) -> None:
        check_counts(steps_per_forward=steps_per_forward)
        self.steps_per_forward = steps_per_forward

    def validate(self, sampler: Sampler) -> None:
        if not sampler.order_is_independent:
            raise ValueError(
                f"Trajectory log-probs need a sampler whose order ignores the tokens, got {sampler!r}; "
                "use RandomOrderSampler or an ElboEstimator."
            )
        if sampler.temperature == 0:
            raise ValueError(
                "Trajectory log-probs need a sampling `temperature` above 0, got 0: greedy samples have no density."
            )
        if sampler.top_k is not None or sampler.top_p is not None:
            raise ValueError(
                "Trajectory log-probs need samples of the whole distribution: leave out `top_k` and `top_p`, or use an "
                "ElboEstimator."
            )

    def rows_log_prob(self, policy: Policy, rows: RolloutRows, *, reference: bool) -> Float[Tensor, " rows"]:
        reveal_step = policy.replayed_steps(rows.reveal_step)
        # Counted from what was recorded, since the sampler is not known here.
        steps = int(reveal_step.max()) + 1
        total = torch.zeros(len(rows), dtype=torch.float32, device=rows.keys.device)
        # Steps take the place of replicates: each sees what was masked before it, and counts what it revealed.
        for first in range(0, steps, self.steps_per_forward):
            masks, revealed = trajectory_masks(reveal_step, range(first, min(first + self.steps_per_forward, steps)))
            log_prob = policy.completion_log_probs(
                rows.prompt_ids,
                rows.prompt_mask,
                rows.completion_ids,
                masks,
                at=revealed,
                reference=reference,
                # That of the sampler, at which the behaviour policy's side was recorded.
                temperature=rows.temperature,
            )
            total += trajectory_log_prob(log_prob, revealed)
        return total

    def behaviour_log_prob(
        self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int
    ) -> Float[Tensor, "batch group"]:
        """log p_old in nats, as it was recorded while sampling. Only the reference has to replay the order."""
        return rollouts.sampled_log_prob.sum(-1)
