"""Coupled-GRPO, the objective of DiffuCoder (arXiv 2506.20639; apple/ml-diffucoder, coupled_grpo.py)."""

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional import leave_one_out_advantage, uniforms
from dmpo_lightning.objectives.diffu_grpo import DiffuGRPO
from dmpo_lightning.objectives.policy_gradient import Scoring


class CoupledGRPO(DiffuGRPO):
    """The loss of `DiffuGRPO` on another estimate; A = r - mean of the others.

    A token's log-prob is ``(l_all + l_1 / t) / 2`` where a first mask, of each position with probability t, hides it,
    and ``(l_all + l_2 / (1 - t)) / 2`` where the complement does; l_all is with everything masked. t is uniform on
    (0.2, 0.8) for each rollout, not for a batch. `WDCE` with ``antithetic`` has nearly these pairs, on all counts.
    """

    epsilon, beta = 0.5, 0.01
    advantage = staticmethod(leave_one_out_advantage)

    def log_probs(self, given: Scoring) -> Float[Tensor, "rows length"]:
        noise = uniforms(given.keys, given.until_end.shape[1] + 1)
        share = 0.2 + 0.6 * noise[:, -1:]
        first = noise[:, :-1] < share
        masks = torch.stack((torch.ones_like(first), first, ~first), dim=1)
        everything, one, two = given.log_probs(masks, at=masks & given.until_end[:, None]).unbind(1)
        return (everything + one / share + two / (1 - share)) / 2
