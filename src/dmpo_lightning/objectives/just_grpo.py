"""JustGRPO, a policy gradient from left to right (arXiv 2601.15165; LeapLabTHU/JustGRPO, grpo.py)."""

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional import z_score_advantage
from dmpo_lightning.objectives.base import Diagnostics, Targets
from dmpo_lightning.objectives.policy_gradient import AdvantageObjective, Scoring


def informative_advantage(reward: Float[Tensor, "batch group"]) -> Float[Tensor, "batch group"]:
    """A, divided by the share of rollouts of a rank's buffer whose A is not 0, instead of a mean over all of them."""
    advantage = z_score_advantage(reward, floor=1e-4)
    return advantage * advantage.numel() / ((advantage != 0).sum() + 1e-5)


class JustGRPO(AdvantageObjective):
    """``-sum A l / (L x rollouts of A != 0)`` with l of each of L tokens given the prompt and the tokens before it.

    A = (r - mean r) / (std + 1e-4). For rollouts from left to right, one token per step (``remasking: sequential``),
    the sum of l is log p itself. The ratio is that of the policy to itself, 1, so that nothing is clipped. `WDCE` has
    that log p with `TrajectoryEstimator`, and its loss on random maskings. Each token is a row of a forward: L rows for
    each rollout of a micro-batch, which is to be 1 for large models.
    """

    advantage = staticmethod(informative_advantage)

    def micro_batch_loss(self, given: Scoring, targets: Targets) -> tuple[Tensor, Diagnostics]:
        blocks = given.blocks
        log_prob = given.along(torch.arange(blocks.shape[1], device=blocks.device).expand_as(blocks), blocks >= 0)
        ratio = (log_prob - log_prob.detach()).exp()
        return -(ratio * targets["advantage"][:, None]).mean(), {}
