"""Weighted direct discriminative optimisation: the target of DMPO through a logistic loss, which is bounded below."""

import math

import torch
from torch import Tensor

from dmpo_lightning.functional import Purpose, check_replicates, draw_masks, elbo, fold_in, wddo_loss
from dmpo_lightning.objectives.base import Diagnostics, MaskedPass, ObjectiveFootprint, Targets
from dmpo_lightning.objectives.log_rnd import LogProbEstimator
from dmpo_lightning.objectives.weighted import WeightedObjective, weight_diagnostics
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows, Rollouts
from dmpo_lightning.samplers.base import Sampler


class WDDO(WeightedObjective):
    """Minimises ``-[w log sigma(beta D) + log sigma(-beta D)]`` with D = log p_theta - log p_old (see `wddo_loss`).

    It needs no baseline. D is estimated on masks that are drawn once per buffer, and many passes over one buffer
    overfit them: use few (``num_iterations``).

    Args:
        reward_temperature: alpha, see `WeightedObjective`.
        beta: the inverse temperature of the discriminator, above 0. With 1 the target itself is the minimiser.
        replicates: the number of maskings of D per rollout. It must be even when ``antithetic`` is true.
        antithetic: draw the maskings in pairs.
        reward_scale: eta, see `WeightedObjective`.
        proximal_coefficient: c, see `WeightedObjective`.
        target_ess: see `WeightedObjective`.
        log_prob: the estimator of log-probs, see `WeightedObjective`.

    Raises:
        ValueError: a value is outside its range, or two values exclude each other.
    """

    def __init__(
        self,
        *,
        reward_temperature: float,
        beta: float = 1.0,
        replicates: int = 4,
        antithetic: bool = True,
        reward_scale: float | None = None,
        proximal_coefficient: float | None = None,
        target_ess: float | None = None,
        log_prob: LogProbEstimator | None = None,
    ) -> None:
        super().__init__(
            reward_temperature=reward_temperature,
            reward_scale=reward_scale,
            proximal_coefficient=proximal_coefficient,
            target_ess=target_ess,
            log_prob=log_prob,
        )
        if not 0 < beta < math.inf:
            raise ValueError(f"`beta` must be positive and finite, got {beta}.")
        check_replicates(replicates, antithetic=antithetic)
        self.beta, self.replicates, self.antithetic = beta, replicates, antithetic

    def footprint(
        self, *, completion_length: int, sampler: Sampler, reference_is_current: bool = False
    ) -> ObjectiveFootprint:
        """The behaviour policy is scored once per buffer on the masks that the loss uses."""
        own = MaskedPass.over(completion_length, replicates=self.replicates)
        log_rnd = self.log_rnd_passes(
            completion_length=completion_length, sampler=sampler, reference_is_current=reference_is_current
        )
        return ObjectiveFootprint(training=own, per_buffer=(*log_rnd, own))

    def prepare(self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int) -> tuple[Targets, Diagnostics]:
        log_rnd = self.log_rnd(policy, rollouts, rows_per_forward=rows_per_forward)
        coefficient = self.coefficient(log_rnd, rollouts.reward)
        weights = self.weights(log_rnd, rollouts.reward, coefficient)
        rows = rollouts.rows()
        chunks = range(0, len(rows), rows_per_forward)
        # Estimated on the masks of the loss. On others the noise of the masking is larger than the difference.
        behaviour = torch.cat([self._elbo(policy, rows[start : start + rows_per_forward]) for start in chunks])
        targets = {"weight": weights, "behaviour_elbo": behaviour.view(rollouts.group_shape), "log_rnd": log_rnd}
        return targets, weight_diagnostics(weights, log_rnd, coefficient)

    def loss(
        self, policy: Policy, rows: RolloutRows, targets: Targets, *, iteration: int, planned_rollouts: int
    ) -> tuple[Tensor, Diagnostics]:
        # The number of the pass keys nothing, or the masks would differ from those of the behaviour policy's side
        # (docs/decisions/008-wddo-few-passes.md).
        log_ratio = self._elbo(policy, rows) - targets["behaviour_elbo"]
        loss = wddo_loss(
            log_ratio,
            targets["weight"],
            length=rows.completion_ids.shape[1],
            beta=self.beta,
            planned_rollouts=planned_rollouts,
        )
        return loss, {"policy/log_ratio": log_ratio.detach().mean()}

    def _elbo(self, policy: Policy, rows: RolloutRows) -> Tensor:
        """Estimates log p of the rows under the policy as it is now.

        The keys do not contain the pass over the buffer, so the masks are those on which log p_old was estimated.
        """
        blocks = policy.completion_blocks(rows.prompt_mask, rows.completion_ids)
        masks = draw_masks(
            fold_in(rows.keys, Purpose.LOSS),
            length=rows.completion_ids.shape[1],
            replicates=self.replicates,
            antithetic=self.antithetic,
            blocks=blocks,
        )
        log_prob = policy.completion_log_probs(rows.prompt_ids, rows.prompt_mask, rows.completion_ids, masks)
        return elbo(log_prob, masks, blocks)
