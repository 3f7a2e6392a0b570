"""Weighted direct discriminative optimisation: the target of DMPO through a logistic loss, which is bounded below."""

import math

from torch import Tensor

from dmpo_lightning.functional import Purpose, check_replicates, elbo, fold_in, wddo_loss
from dmpo_lightning.objectives.base import Diagnostics, Targets, score_rollouts
from dmpo_lightning.objectives.estimators import LogProbEstimator, masked_log_probs
from dmpo_lightning.objectives.weighted import WeightedObjective
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows, Rollouts


class WDDO(WeightedObjective):
    """Minimises ``-[w log sigma(beta D) + log sigma(-beta D)]`` with D = log p_theta - log p_old (see `wddo_loss`).

    It needs no baseline. D is estimated on masks that are drawn once per buffer, and many passes over one buffer
    overfit them: use few (``num_iterations``).

    Args:
        reward_temperature: alpha, see `WeightedObjective`.
        beta: the inverse temperature of the discriminator, above 0. With 1 the target itself is the minimiser.
        replicates: the number of maskings of D per rollout. It must be even when ``antithetic`` is true.
        antithetic: draw the maskings in pairs.
        proximal_coefficient: c, see `WeightedObjective`.
        estimator: of log-probs, see `WeightedObjective`.

    Raises:
        ValueError: a value is outside its range, or two values exclude each other.

    Example:
        >>> from dmpo_lightning import WDDO
        >>> objective = WDDO(reward_temperature=0.1, beta=0.5)
    """

    def __init__(
        self,
        *,
        reward_temperature: float,
        beta: float = 1.0,
        replicates: int = 4,
        antithetic: bool = True,
        proximal_coefficient: float = 1.0,
        estimator: LogProbEstimator | None = None,
    ) -> None:
        super().__init__(
            reward_temperature=reward_temperature,
            proximal_coefficient=proximal_coefficient,
            estimator=estimator,
        )
        if not 0 < beta < math.inf:
            raise ValueError(f"`beta` must be positive and finite, got {beta}.")
        check_replicates(replicates, antithetic=antithetic)
        self.beta, self.replicates, self.antithetic = beta, replicates, antithetic

    def prepare(self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int) -> tuple[Targets, Diagnostics]:
        weights, log_rnd, diagnostics = self.weigh(policy, rollouts, rows_per_forward=rows_per_forward)
        # Estimated on the masks of the loss. On others the noise of the masking is larger than the difference.
        behaviour = score_rollouts(lambda rows: self._elbo(policy, rows), rollouts, rows_per_forward)
        return {"weight": weights, "behaviour_elbo": behaviour, "log_rnd": log_rnd}, diagnostics

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
        keys = fold_in(rows.keys, Purpose.LOSS)
        return elbo(*masked_log_probs(policy, rows, keys, replicates=self.replicates, antithetic=self.antithetic))
