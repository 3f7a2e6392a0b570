"""Importance weights of a rollout buffer, which WDCE and WDDO share."""

import math

from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional import effective_sample_size, importance_weights
from dmpo_lightning.objectives.base import Diagnostics, Objective
from dmpo_lightning.objectives.estimators import ElboEstimator, LogProbEstimator
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import Rollouts
from dmpo_lightning.samplers import Sampler


class WeightedObjective(Objective):
    """Weights rollouts towards the target distribution ``p_ref exp(r / alpha) / Z``. What loss follows is left open.

    Args:
        reward_temperature: alpha, above 0. A smaller one trusts the reward more.
        proximal_coefficient: c in (0, 1], the power to which the density ratio is raised. 1 aims at the target itself.
        estimator: how log p_ref - log p_old is estimated. None takes an `ElboEstimator`.

    Raises:
        ValueError: a value is outside its range.
    """

    def __init__(
        self,
        *,
        reward_temperature: float,
        proximal_coefficient: float = 1.0,
        estimator: LogProbEstimator | None = None,
    ) -> None:
        # Written so that NaN, which compares as false with everything, fails.
        if not 0 < reward_temperature < math.inf:
            raise ValueError(
                f"`reward_temperature` (alpha) must be positive and finite, got {reward_temperature}; for weights that "
                "depend on the reward alone set `reference_refresh_interval` 1 beside it, by which log_rnd is zero."
            )
        if not 0 < proximal_coefficient <= 1:
            raise ValueError(f"`proximal_coefficient` must be in (0, 1], got {proximal_coefficient}.")
        self.reward_temperature, self.proximal_coefficient = reward_temperature, proximal_coefficient
        # Rollouts of any sampler have an ELBO, while trajectories need an order that ignores the tokens.
        self.estimator = estimator or ElboEstimator()

    def validate(self, *, group_size: int, sampler: Sampler) -> None:
        if group_size < 2:
            raise ValueError(
                f"`group_size` must be at least 2: weights compare the rollouts of one prompt, got {group_size}."
            )
        self.estimator.validate(sampler)

    def weigh(
        self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int
    ) -> tuple[Float[Tensor, "batch group"], Float[Tensor, "batch group"], Diagnostics]:
        """The importance weights, with mean 1 over each group, the log_rnd that they come from, and what to log.

        What is logged tells early that a run goes wrong: the effective sample size, and the spread of log_rnd within
        groups.
        """
        log_rnd = self.estimator.log_rnd(policy, rollouts, rows_per_forward=rows_per_forward)
        weights = importance_weights(
            log_rnd,
            rollouts.reward,
            reward_temperature=self.reward_temperature,
            proximal_coefficient=self.proximal_coefficient,
        )
        diagnostics = {
            "weight/ess": effective_sample_size(weights).mean(),
            "weight/max": weights.amax(-1).mean(),
            "policy/log_rnd": log_rnd.mean(),
            # Not NaN, because `validate` asks for two rollouts at least.
            "policy/log_rnd_spread": log_rnd.std(-1).mean(),
        }
        return weights, log_rnd, diagnostics
