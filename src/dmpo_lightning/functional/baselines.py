"""Weight baselines b of ``w - b``; DMPO (arXiv 2510.08233). All are detached and have mean 1 over a group, or are
zero.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional.weights import equal_reward_groups, importance_weights, reward_weights


def no_baseline(reward: Float[Tensor, "batch group"]) -> Float[Tensor, "batch group"]:
    """B = 0: plain weighted cross-entropy."""
    return torch.zeros_like(reward, dtype=torch.float32)


def group_baseline(reward: Float[Tensor, "batch group"]) -> Float[Tensor, "batch group"]:
    """B = 1: the mean of the self-normalised weights."""
    return torch.ones_like(reward, dtype=torch.float32)


def negative_baseline(
    weights: Float[Tensor, "batch group"],
    log_rnd: Float[Tensor, "batch group"],
    reward: Float[Tensor, "batch group"],
    *,
    reward_temperature: float,
    proximal_coefficient: float | Float[Tensor, "batch 1"] = 1.0,
) -> Float[Tensor, "batch group"]:
    """The weights of the opposite reward, -r, with the same c: what is worse than it should be is pushed down.

    A group of equal rewards gets ``weights`` themselves, so that ``w - b`` is exactly zero there and its forward
    passes can be skipped.
    The objective has no interior fixed point: watch reward, entropy and ESS.
    """
    opposite = importance_weights(
        log_rnd, -reward, reward_temperature=reward_temperature, proximal_coefficient=proximal_coefficient
    )
    return torch.where(equal_reward_groups(reward)[:, None], weights, opposite)


def negative_reward_baseline(
    weights: Float[Tensor, "batch group"], reward: Float[Tensor, "batch group"], *, reward_scale: float
) -> Float[Tensor, "batch group"]:
    """`negative_baseline` in the limit alpha = 0."""
    opposite = reward_weights(-reward, reward_scale=reward_scale)
    return torch.where(equal_reward_groups(reward)[:, None], weights, opposite)


def policy_baseline(
    log_prob: Float[Tensor, "batch group"], behaviour_log_prob: Float[Tensor, "batch group"]
) -> Float[Tensor, "batch group"]:
    """``G softmax(log p_theta - log p_old)``, detached: the weights under which the current policy itself is the
    target.

    Both log-probs must come from the same masks (or the same recorded orders).
    """
    log_ratio = (log_prob - behaviour_log_prob).detach().float()
    return log_ratio.shape[-1] * torch.softmax(log_ratio, dim=-1)
