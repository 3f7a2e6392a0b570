"""wd1, weighted likelihoods without a ratio (arXiv 2507.08838; xiaohangt/wd1, rev_grpo_trainer.py)."""

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional import importance_weights, negative_baseline
from dmpo_lightning.objectives.base import Diagnostics, Targets
from dmpo_lightning.objectives.policy_gradient import AdvantageObjective, Scoring


def wd1_signal(reward: Float[Tensor, "batch group"]) -> Float[Tensor, "batch group"]:
    """``G (softmax(r) - softmax(-r))`` of each group."""
    weights = importance_weights(torch.zeros_like(reward), reward, reward_temperature=1.0)
    return weights - negative_baseline(weights, torch.zeros_like(reward), reward, reward_temperature=1.0)


class WD1(AdvantageObjective):
    """``-sum_i (softmax(r)_i - softmax(-r)_i) sum_k l_ik`` over a group, tokens by `Scoring.mean_field`.

    It is `WDCE` in its published form (baseline ``negative``, log p for both signs) with alpha 1 and log_rnd 0, on that
    estimate of log p and not divided by the number of tokens.
    """

    advantage = staticmethod(wd1_signal)

    def micro_batch_loss(self, given: Scoring, targets: Targets) -> tuple[Tensor, Diagnostics]:
        return -(targets["advantage"] * given.mean_field().sum(-1)).mean(), {}
