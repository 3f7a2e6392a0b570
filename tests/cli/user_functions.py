"""Baselines of a user, with and without annotations."""

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional import group_baseline
from dmpo_lightning.rollout import Rollouts


def plain(weights, log_rnd, rollouts):
    return weights.mean(-1, keepdim=True)


def annotated(weights: Tensor, log_rnd: Tensor, rollouts: Rollouts) -> Tensor:
    return group_baseline(rollouts.reward)


def with_axes(
    weights: Float[Tensor, "batch group"], log_rnd: Float[Tensor, "batch group"], rollouts: Rollouts
) -> Float[Tensor, "batch group"]:
    return torch.ones_like(weights)


class Scaled:
    """A baseline with a setting."""

    def __init__(self, by: float = 1.0) -> None:
        self.by = by

    def __call__(self, weights, log_rnd, rollouts):
        return self.by * torch.ones_like(weights)


def transposed(weights, log_rnd, rollouts):
    return weights.T
