"""Importance weights of a rollout buffer, which WDCE and WDDO share."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional import adaptive_proximal_coefficient, effective_sample_size, importance_weights
from dmpo_lightning.objectives.base import Diagnostics, Objective
from dmpo_lightning.objectives.estimators import ElboEstimator, LogProbEstimator
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import Rollouts


@dataclass(frozen=True)
class Weighting:
    """The importance weights of a buffer and what they were made of."""

    log_rnd: Float[Tensor, "batch group"]
    coefficient: float | Float[Tensor, "batch 1"]
    """The proximal coefficient c: one for all groups, or one per group where ``target_ess`` chooses it."""
    weights: Float[Tensor, "batch group"]
    """They have mean 1 over each group."""

    def diagnostics(self) -> Diagnostics:
        """What tells early that a run goes wrong: effective sample size, the spread of log_rnd within groups, and c."""
        return {
            "weight/ess": effective_sample_size(self.weights).mean(),
            "weight/max": self.weights.amax(-1).mean(),
            "policy/log_rnd": self.log_rnd.mean(),
            # Not NaN, because `validate` asks for two rollouts at least.
            "policy/log_rnd_spread": self.log_rnd.std(-1).mean(),
            "weight/proximal_coefficient": torch.as_tensor(self.coefficient, dtype=torch.float32).mean(),
        }


class WeightedObjective(Objective):
    """Weights rollouts towards the target distribution ``p_ref exp(r / alpha) / Z``. What loss follows is left open.

    Args:
        reward_temperature: alpha, above 0. A smaller one trusts the reward more.
        proximal_coefficient: c in (0, 1], the power to which the density ratio is raised. 1, the default, aims at the
            target itself.
        target_ess: chooses c for each group, as the largest whose effective sample size reaches this share, in (0, 1].
            Not together with c.
        estimator: how log p_ref - log p_old is estimated. None takes an `ElboEstimator`.

    Raises:
        ValueError: a value is outside its range, or two values exclude each other.
    """

    def __init__(
        self,
        *,
        reward_temperature: float,
        proximal_coefficient: float | None = None,
        target_ess: float | None = None,
        estimator: LogProbEstimator | None = None,
    ) -> None:
        # Written so that NaN, which compares as false with everything, fails.
        if not 0 < reward_temperature < math.inf:
            raise ValueError(
                f"`reward_temperature` (alpha) must be positive and finite, got {reward_temperature}; for weights that "
                "depend on the reward alone set `reference_refresh_interval` 1 beside it, by which log_rnd is zero."
            )
        if proximal_coefficient is not None and target_ess is not None:
            raise ValueError("Set `proximal_coefficient` or `target_ess`, not both: the second chooses the first.")
        for name, value in (("proximal_coefficient", proximal_coefficient), ("target_ess", target_ess)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"`{name}` must be in (0, 1], got {value}.")
        self.reward_temperature = reward_temperature
        self.proximal_coefficient, self.target_ess = proximal_coefficient, target_ess
        # Rollouts of any sampler have an ELBO, while trajectories need an order that ignores the tokens.
        self.estimator = estimator or ElboEstimator()

    def validate(self, *, group_size: int, completion_length: int, sampler: object) -> None:
        if group_size < 2:
            raise ValueError(
                f"`group_size` must be at least 2: weights compare the rollouts of one prompt, got {group_size}."
            )
        self.estimator.validate(sampler)

    def weigh(self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int) -> Weighting:
        """Estimates log_rnd, chooses c and weights the rollouts."""
        log_rnd, reward = self.estimator.log_rnd(policy, rollouts, rows_per_forward=rows_per_forward), rollouts.reward
        alpha = self.reward_temperature
        coefficient: float | Tensor = self.proximal_coefficient or 1.0
        if self.target_ess is not None:
            coefficient = adaptive_proximal_coefficient(
                log_rnd, reward, reward_temperature=alpha, target_ess=self.target_ess
            )
        weights = importance_weights(log_rnd, reward, reward_temperature=alpha, proximal_coefficient=coefficient)
        return Weighting(log_rnd, coefficient, weights)
