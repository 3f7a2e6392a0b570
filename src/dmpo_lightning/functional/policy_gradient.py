"""What policy-gradient methods share: advantages, clipped ratios and estimates of a KL divergence."""

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional.weights import equal_reward_groups


def centred_advantage(reward: Float[Tensor, "batch group"]) -> Float[Tensor, "batch group"]:
    """``r - mean r`` of each group, not divided by its spread (Dr. GRPO, arXiv 2503.20783)."""
    return reward - reward.mean(-1, keepdim=True)


def leave_one_out_advantage(reward: Float[Tensor, "batch group"]) -> Float[Tensor, "batch group"]:
    """``r - mean of the others``, which is G / (G - 1) times `centred_advantage` (RLOO, arXiv 2402.14740)."""
    return centred_advantage(reward) * (reward.shape[-1] / (reward.shape[-1] - 1))


def z_score_advantage(
    reward: Float[Tensor, "batch group"], *, correction: int = 1, floor: float = 0.0
) -> Float[Tensor, "batch group"]:
    """``(r - mean) / (std + floor)`` of each group, over G - correction; 0 where all are equal (GRPO, 2402.03300)."""
    scaled = centred_advantage(reward) / (reward.std(-1, keepdim=True, correction=correction) + floor)
    return scaled.masked_fill(equal_reward_groups(reward)[:, None], 0)


def clipped_surrogate(
    ratio: Float[Tensor, "*units"], advantage: Float[Tensor, "*units"], epsilon: float
) -> Float[Tensor, "*units"]:
    """``min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A)`` with rho the ``ratio``, to be maximised (PPO)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def k2(log_ratio: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    """``d^2 / 2`` of ``log_ratio`` d = log p_theta - log p_ref, an estimate of KL(policy || ref) (Schulman 2020)."""
    return log_ratio**2 / 2


def k3(log_ratio: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    """``e^-d + d - 1``, an estimate of KL(policy || ref) as `k2` is, without bias on samples of the policy."""
    return (-log_ratio).exp() + log_ratio - 1
