"""Weight baselines b, which objectives subtract from the importance weights: ``w - b``; DMPO (arXiv 2510.08233).

Every baseline is detached. Apart from `no_baseline`, which is zero, each has mean 1 over a group, as the weights of
prompts that count alike do.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional.weights import equal_reward_groups, importance_weights


def no_baseline(reward: Float[Tensor, "batch group"]) -> Float[Tensor, "batch group"]:
    """b = 0: every rollout is imitated in proportion to its weight, and none is pushed down."""
    return torch.zeros_like(reward, dtype=torch.float32)


def group_baseline(reward: Float[Tensor, "batch group"]) -> Float[Tensor, "batch group"]:
    """b = 1, the mean of the weights: a rollout is pushed up or down as it weighs more or less than its group."""
    return torch.ones_like(reward, dtype=torch.float32)


def negative_baseline(
    weights: Float[Tensor, "batch group"],
    log_rnd: Float[Tensor, "batch group"],
    reward: Float[Tensor, "batch group"],
    *,
    reward_temperature: float,
    proximal_coefficient: float = 1.0,
) -> Float[Tensor, "batch group"]:
    """The weights that the opposite reward, -r, would give with the same c: the worst rollouts are pushed down most.

    A group of equal rewards says nothing about what is better. Its baseline is ``weights`` itself, so that ``w - b`` is
    exactly zero and its forward passes can be skipped.

    The objective that follows has no interior fixed point: its optimum is not p* in any form of the negative term, and
    with log p, the published one, the loss is unbounded below. Watch reward, entropy and effective sample size.
    """
    opposite = importance_weights(
        log_rnd, -reward, reward_temperature=reward_temperature, proximal_coefficient=proximal_coefficient
    )
    return torch.where(equal_reward_groups(reward)[:, None], weights, opposite)


def policy_baseline(
    log_prob: Float[Tensor, "batch group"], behaviour_log_prob: Float[Tensor, "batch group"]
) -> Float[Tensor, "batch group"]:
    """``G softmax(log p_theta - log p_old)``: the weights under which the current policy itself is the target.

    Both log-probs must come from the same masks, or from the same recorded orders, so that the noise of the masking
    cancels in their difference.
    """
    log_ratio = (log_prob - behaviour_log_prob).detach().float()
    return log_ratio.shape[-1] * torch.softmax(log_ratio, dim=-1)
