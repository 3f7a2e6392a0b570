"""Self-normalised importance weights towards the reward-tilted reference; DMPO (arXiv 2510.08233)."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EQUAL_REWARD_TOLERANCE = 1e-6
"""Rewards that differ by no more than this, within one group, count as equal: they carry no preference."""


def importance_weights(
    log_rnd: Float[Tensor, "batch group"],
    reward: Float[Tensor, "batch group"],
    *,
    reward_temperature: float,
    proximal_coefficient: float = 1.0,
) -> Float[Tensor, "batch group"]:
    """Weights that turn rollouts of the behaviour policy into rollouts of the target ``p_ref exp(r / alpha) / Z``.

    They are ``G softmax(c (log_rnd + r / alpha))`` over each group of G, so their mean is 1 and Z is never needed.
    ``log_rnd`` is log p_ref - log p_old in nats. ``reward_temperature`` is alpha, above 0.

    ``proximal_coefficient`` c in (0, 1] raises the density ratio of target and behaviour policy to the power c. With 1
    the target itself is aimed at, and with less a distribution on the way there.
    """
    log_weights = proximal_coefficient * (log_rnd.float() + reward.float() / reward_temperature)
    return log_weights.shape[-1] * torch.softmax(log_weights, dim=-1)


def log_partition(reward: Float[Tensor, "batch group"], *, reward_temperature: float) -> Float[Tensor, " batch"]:
    """The logarithm of the mean of ``exp(r / alpha)`` over each group, an estimate of log Z of its target.

    It is in float64, since rewards over a small alpha are large.
    """
    return (reward.double() / reward_temperature).logsumexp(-1) - math.log(reward.shape[-1])


def effective_sample_size(weights: Float[Tensor, "batch group"]) -> Float[Tensor, " batch"]:
    """``(sum w)^2 / (G sum w^2)`` in [1/G, 1]: the share of a group that carries the weight.

    It is 1 where all rollouts weigh the same, and 1/G where one of them has all the weight.
    """
    return weights.sum(-1) ** 2 / (weights.shape[-1] * (weights**2).sum(-1))


def equal_reward_groups(reward: Float[Tensor, "batch group"]) -> Bool[Tensor, " batch"]:
    """Which groups have rewards that all agree within `EQUAL_REWARD_TOLERANCE`, so that none is preferred."""
    return reward.amax(-1) - reward.amin(-1) <= EQUAL_REWARD_TOLERANCE


def merged_signal(
    signal: Float[Tensor, "batch group"], completion_ids: Int[Tensor, "batch group length"]
) -> Float[Tensor, "batch group"]:
    """The signals of identical completions of a prompt, summed into that of the first of them. The others have zero.

    The loss is linear in the signal of each sign, so that its expectation over maskings does not change where identical
    completions have one reward.
    """
    same = (completion_ids[:, :, None] == completion_ids[:, None]).all(-1)
    # `argmax` takes no booleans. Of equal values it returns the first.
    return torch.zeros_like(signal).scatter_add(1, same.int().argmax(-1), signal)


def negligible(signal: Float[Tensor, " rows"], tolerance: float) -> Bool[Tensor, " rows"]:
    """The rows of least ``|w - b|`` that together hold at most the share ``tolerance`` of its sum.

    Leaving them out of the loss changes its gradient by about that share. A ``tolerance`` of 0 takes rows of exactly
    zero signal alone, which changes nothing.
    """
    # In float64, so that adding many small numbers does not lose the smallest.
    mass, order = signal.abs().double().sort(stable=True)
    held = mass.cumsum(0)
    return torch.zeros_like(signal, dtype=torch.bool).scatter(0, order, held <= tolerance * mass.sum())
