"""What policy-gradient methods share: advantages, clipped ratios and estimates of a KL divergence."""

import torch
from jaxtyping import Float
from torch import Tensor


def centred_advantage(reward: Float[Tensor, "batch group"]) -> Float[Tensor, "batch group"]:
    """``r - mean r`` of each group, not divided by its spread (Dr. GRPO, arXiv 2503.20783)."""
    return reward - reward.mean(-1, keepdim=True)


def leave_one_out_advantage(reward: Float[Tensor, "batch group"]) -> Float[Tensor, "batch group"]:
    """``r - mean of the others`` (RLOO, arXiv 2402.14740). It is G / (G - 1) times `centred_advantage`."""
    group = reward.shape[-1]
    return reward - (reward.sum(-1, keepdim=True) - reward) / (group - 1)


def z_score_advantage(
    reward: Float[Tensor, "batch group"], *, correction: int = 1, floor: float = 1e-6
) -> Float[Tensor, "batch group"]:
    """``(r - mean) / (std + floor)`` of each group (GRPO, arXiv 2402.03300). Groups of equal rewards have 0.

    ``correction`` is what the number of rollouts is lowered by in the standard deviation: 0 or 1.
    """
    return centred_advantage(reward) / (reward.std(-1, keepdim=True, correction=correction) + floor)


def clipped_surrogate(
    log_ratio: Float[Tensor, "*units"], advantage: Float[Tensor, "*units"], epsilon: float
) -> Float[Tensor, "*units"]:
    """``min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A)`` with ``rho = exp(log_ratio)``, to be maximised (PPO).

    Its gradient is that of ``rho A`` until rho has moved by epsilon in the direction of A, and zero from there on.
    """
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def k2(log_ratio: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    """``d^2 / 2``, whose gradient is that of KL(policy || reference) on samples of the policy (Schulman 2020).

    ``log_ratio`` d is log p_theta - log p_ref.
    """
    return log_ratio**2 / 2


def k3(log_ratio: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    """``e^-d + d - 1``, an estimate of KL(policy || reference) that is at least 0 (Schulman 2020); d as in `k2`."""
    return (-log_ratio).exp() + log_ratio - 1
