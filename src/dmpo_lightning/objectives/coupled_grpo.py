"""Coupled-GRPO, the objective of DiffuCoder (arXiv 2506.20639; apple/ml-diffucoder, coupled_grpo.py)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dmpo_lightning.functional import leave_one_out_advantage, uniforms
from dmpo_lightning.objectives.policy_gradient import PolicyGradient, token_mean, until_end
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows


class CoupledGRPO(PolicyGradient):
    """``sum [-min(rho A, clip(rho) A) + beta k3] / tokens`` with a ratio per token; A = r - mean of the others.

    A token's log-prob is ``(l_all + l_1 / t) / 2`` where a first mask, of each position with probability t, hides it,
    and ``(l_all + l_2 / (1 - t)) / 2`` where the complement does; l_all is with everything masked. So every token is
    scored, once with context. `WDCE` with ``antithetic`` has nearly the same pairs, with counts on all of 1..L.

    t is uniform on (0.2, 0.8), as published, and drawn for each rollout; there one t serves a whole batch.

    Args:
        epsilon: see `PolicyGradient`.
        beta: see `PolicyGradient`.
        mask_draws: see `PolicyGradient`.
    """

    advantage = staticmethod(leave_one_out_advantage)

    def __init__(self, *, epsilon: float = 0.5, beta: float = 0.01, mask_draws: int = 1) -> None:
        super().__init__(epsilon=epsilon, beta=beta, mask_draws=mask_draws)

    def log_probs(
        self, policy: Policy, rows: RolloutRows, keys: Int[Tensor, " rows"], *, reference: bool = False
    ) -> Float[Tensor, "rows length"]:
        noise = uniforms(keys, rows.completion_ids.shape[1] + 1)
        share = 0.2 + 0.6 * noise[:, -1:]
        first = noise[:, :-1] < share
        masks = torch.stack((torch.ones_like(first), first, ~first), dim=1)
        at = masks & until_end(policy, rows)[:, None]
        log_prob = policy.completion_log_probs(
            rows.prompt_ids, rows.prompt_mask, rows.completion_ids, masks, at=at, reference=reference
        )
        # Where a mask does not hide a token its log-prob is 0 there.
        return (log_prob[:, 0] + log_prob[:, 1] / share + log_prob[:, 2] / (1 - share)) / 2

    def weights(self, policy: Policy, rows: RolloutRows, planned_rollouts: int) -> Float[Tensor, "rows length"]:
        return token_mean(policy, rows)
