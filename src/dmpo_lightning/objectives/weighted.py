"""Importance weights of a rollout buffer, which WDCE and WDDO share."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional import (
    adaptive_proximal_coefficient,
    effective_sample_size,
    importance_weights,
    reward_weights,
)
from dmpo_lightning.objectives.base import Diagnostics, MaskedPass, Objective
from dmpo_lightning.objectives.log_rnd import ElboEstimator, LogProbEstimator
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import Rollouts
from dmpo_lightning.samplers.base import Sampler


class WeightedObjective(Objective):
    """Weights rollouts towards the target distribution ``p_ref exp(r / alpha) / Z``. What loss follows is left open.

    Args:
        reward_temperature: alpha. A smaller one trusts the reward more. 0 drops the reference and needs
            ``reward_scale``.
        reward_scale: eta, with alpha = 0 only: weights are proportional to exp(eta r).
        proximal_coefficient: c in (0, 1], the power to which the density ratio is raised. 1, the default, aims at the
            target itself.
        target_ess: chooses c for each group, as the largest whose effective sample size reaches this share, in (0, 1].
            Not together with c.
        log_prob: how log p_ref - log p_old is estimated. None takes an `ElboEstimator`.

    Raises:
        ValueError: a value is outside its range, or two values exclude each other.
    """

    def __init__(
        self,
        *,
        reward_temperature: float,
        reward_scale: float | None = None,
        proximal_coefficient: float | None = None,
        target_ess: float | None = None,
        log_prob: LogProbEstimator | None = None,
    ) -> None:
        # Written so that NaN, which compares as false with everything, fails.
        if not 0 <= reward_temperature < math.inf:
            raise ValueError(f"`reward_temperature` (alpha) must be finite and at least 0, got {reward_temperature}.")
        if (reward_temperature == 0) != (reward_scale is not None):
            raise ValueError(
                f"`reward_scale` (eta) goes with reward_temperature 0 and with nothing else, got {reward_scale} "
                f"and {reward_temperature}."
            )
        if reward_temperature == 0 and (proximal_coefficient is not None or target_ess is not None):
            raise ValueError(
                "`proximal_coefficient` and `target_ess` need reward_temperature > 0; at 0 set `reward_scale` alone."
            )
        if proximal_coefficient is not None and target_ess is not None:
            raise ValueError("Set `proximal_coefficient` or `target_ess`, not both: the second chooses the first.")
        for name, value in (("proximal_coefficient", proximal_coefficient), ("target_ess", target_ess)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"`{name}` must be in (0, 1], got {value}.")
        if reward_scale is not None and not 0 < reward_scale < math.inf:
            raise ValueError(f"`reward_scale` (eta) must be positive and finite, got {reward_scale}.")
        self.reward_temperature, self.reward_scale = reward_temperature, reward_scale
        self.proximal_coefficient, self.target_ess = proximal_coefficient, target_ess
        # Rollouts of any sampler have an ELBO, while trajectories need an order that ignores the tokens.
        self.log_prob = log_prob or ElboEstimator()

    def validate(self, *, group_size: int, completion_length: int, sampler: object) -> None:
        if group_size < 2:
            raise ValueError(
                f"`group_size` must be at least 2: weights compare the rollouts of one prompt, got {group_size}."
            )
        # At alpha = 0 weights need no log-prob, and any sampler will do.
        if self.reward_scale is None:
            self.log_prob.validate(sampler)

    def validate_policy(self, policy: Policy) -> None:
        if self.reward_scale is None:
            self.log_prob.validate_policy(policy)

    def log_rnd_passes(
        self, *, completion_length: int, sampler: Sampler, reference_is_current: bool
    ) -> tuple[MaskedPass, ...]:
        """The passes that `log_rnd` runs: one for each side of the difference that is neither recorded nor zero."""
        if self.reward_scale is not None or reference_is_current:
            return ()
        one = self.log_prob.footprint(completion_length=completion_length, sampler=sampler)
        return (one,) if self.log_prob.behaviour_is_recorded else (one, one)

    def log_rnd(self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int) -> Float[Tensor, "batch group"]:
        """Estimates log p_ref - log p_old in nats. It is zero at alpha = 0, where weights do not use it."""
        if self.reward_scale is not None:
            return torch.zeros_like(rollouts.reward)
        return self.log_prob.log_rnd(policy, rollouts, rows_per_forward=rows_per_forward)

    def coefficient(self, log_rnd: Tensor, reward: Tensor) -> float | Float[Tensor, "batch 1"]:
        """The proximal coefficient c: one for all groups, or one per group where ``target_ess`` chooses it."""
        if self.target_ess is None:
            return self.proximal_coefficient or 1.0
        return adaptive_proximal_coefficient(
            log_rnd, reward, reward_temperature=self.reward_temperature, target_ess=self.target_ess
        )

    def weights(self, log_rnd: Tensor, reward: Tensor, coefficient: float | Tensor) -> Float[Tensor, "batch group"]:
        """The importance weights, with mean 1 over each group."""
        if self.reward_scale is not None:
            return reward_weights(reward, reward_scale=self.reward_scale)
        return importance_weights(
            log_rnd, reward, reward_temperature=self.reward_temperature, proximal_coefficient=coefficient
        )


def weight_diagnostics(weights: Tensor, log_rnd: Tensor, coefficient: float | Tensor) -> Diagnostics:
    """What tells early that a run goes wrong: effective sample size, the spread of log_rnd within groups, and c."""
    return {
        "weight/ess": effective_sample_size(weights).mean(),
        "weight/max": weights.amax(-1).mean(),
        "policy/log_rnd": log_rnd.mean(),
        # Not NaN, because `validate` asks for two rollouts at least.
        "policy/log_rnd_spread": log_rnd.std(-1).mean(),
        "weight/proximal_coefficient": torch.as_tensor(coefficient, dtype=torch.float32).mean(),
    }
