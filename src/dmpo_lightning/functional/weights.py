"""Self-normalised importance weights towards the reward-tilted reference; DMPO (arXiv 2510.08233)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EQUAL_REWARD_TOLERANCE = 1e-6
"""Rewards of a group within this range carry no preference."""


def importance_weights(
    log_rnd: Float[Tensor, "batch group"],
    reward: Float[Tensor, "batch group"],
    *,
    reward_temperature: float,
    proximal_coefficient: float | Float[Tensor, "batch 1"] = 1.0,
) -> Float[Tensor, "batch group"]:
    """Weights (mean 1 over each group) towards ``p_ref exp(r / alpha) / Z``; ``log_rnd`` = log p_ref - log p_old in
    nats.

    ``proximal_coefficient`` c in (0, 1] raises the density ratio to the power c: 1 aims at the target itself, less
    takes a shorter step.
    """
    return _normalised(proximal_coefficient * (log_rnd.float() + reward.float() / reward_temperature))


def reward_weights(reward: Float[Tensor, "batch group"], *, reward_scale: float) -> Float[Tensor, "batch group"]:
    """The limit alpha = 0: weights (mean 1) proportional to ``exp(eta r)``, with no pull towards the reference."""
    return _normalised(reward_scale * reward.float())


def effective_sample_size(weights: Float[Tensor, "batch group"]) -> Float[Tensor, " batch"]:
    """``(sum w)^2 / (G sum w^2)`` in [1/G, 1]: the share of the group that carries the weight."""
    return weights.sum(-1) ** 2 / (weights.shape[-1] * (weights**2).sum(-1))


def adaptive_proximal_coefficient(
    log_rnd: Float[Tensor, "batch group"],
    reward: Float[Tensor, "batch group"],
    *,
    reward_temperature: float,
    target_ess: float,
    iterations: int = 40,
) -> Float[Tensor, "batch 1"]:
    """The largest c in (0, 1] per group whose effective sample size is at least ``target_ess``, by bisection (the
    size falls with c).
    """

    def ess(coefficient: Float[Tensor, "batch 1"]) -> Float[Tensor, "batch 1"]:
        weights = importance_weights(
            log_rnd, reward, reward_temperature=reward_temperature, proximal_coefficient=coefficient
        )
        return effective_sample_size(weights)[:, None]

    low, high = (
        torch.zeros_like(log_rnd[:, :1], dtype=torch.float32),
        torch.ones_like(log_rnd[:, :1], dtype=torch.float32),
    )
    full_step = ess(high) >= target_ess
    for _ in range(iterations):
        middle = (low + high) / 2
        enough = ess(middle) >= target_ess
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(full_step, 1.0, low.clamp(min=torch.finfo(torch.float32).tiny))


def equal_reward_groups(reward: Float[Tensor, "batch group"]) -> Bool[Tensor, " batch"]:
    """Groups whose rewards are all the same within `EQUAL_REWARD_TOLERANCE`."""
    return reward.amax(-1) - reward.amin(-1) <= EQUAL_REWARD_TOLERANCE


def negligible(signal: Float[Tensor, " rows"], tolerance: float) -> Bool[Tensor, " rows"]:
    """The rows of least ``|w - b|`` that hold at most the share ``tolerance`` of its sum; 0 takes exact zeros alone.

    Leaving them out of the loss changes its gradient by about that share, and by less where rows pull alike.
    """
    mass, order = signal.abs().double().sort(stable=True)
    held = mass.cumsum(0)
    return torch.zeros_like(signal, dtype=torch.bool).scatter(0, order, held <= tolerance * mass.sum())


def _normalised(log_weights: Float[Tensor, "batch group"]) -> Float[Tensor, "batch group"]:
    return log_weights.shape[-1] * torch.softmax(log_weights, dim=-1)
