"""SPG, sandwiched policy gradient (arXiv 2510.09541; facebookresearch/SPG, spg_trainer.py), and StableDRL."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional import Purpose, block_random_masks, fold_in, mean_eubo
from dmpo_lightning.objectives.base import Diagnostics, Targets, score_rollouts
from dmpo_lightning.objectives.policy_gradient import PERTURBATION, AdvantageObjective, Scoring
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows, Rollouts, check_counts


class SPG(AdvantageObjective):
    """``-sum w A S`` over a micro-batch: A = r - mean r, S a bound of log p per token, w the share of the tokens.

    Where A is above 0, S is a lower bound, the mean of l over masked tokens. Elsewhere it is ``mix`` times an upper one
    (`mean_eubo`) plus the rest of the lower. Masks are two `block_random_masks`, and some of the prompt. `WDCE` answers
    the same trouble, that pushing a lower bound down says nothing about log p, by minimising p there.

    Args:
        mix: the share of the upper bound, in [0, 1].
        eubo_beta: b of `mean_eubo`, at least 1. The larger, the tighter and the noisier.
        block_length: as that of the sampler.
        ratio_clip: takes ``w = softmax min(lower - lower_old, log ratio_clip)`` over the micro-batch, detached, as
            StableDRL (arXiv 2603.06743; JianyuanZhong/StableDRL, llada_svpo.py) does with 5. Lower bounds are per
            token, that of the behaviour policy on masks of its own. `WDCE` weighs towards its target instead.
    """

    draws = 2

    def __init__(
        self, *, mix: float = 0.5, eubo_beta: float = 1.5, block_length: int = 32, ratio_clip: float | None = None
    ) -> None:
        check_counts(block_length=block_length)
        self.mix, self.eubo_beta, self.block_length, self.ratio_clip = mix, eubo_beta, block_length, ratio_clip

    def prepare(self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int) -> tuple[Targets, Diagnostics]:
        def lower(rows: RolloutRows) -> Tensor:
            return self.bounds(Scoring(policy, rows, fold_in(rows.keys, Purpose.ELBO)))[0]

        targets = {"advantage": self.advantage(rollouts.reward)}
        if self.ratio_clip is not None:
            targets["behaviour_bound"] = score_rollouts(lower, rollouts, rows_per_forward)
        return targets, {}

    def micro_batch_loss(self, given: Scoring, targets: Targets) -> tuple[Tensor, Diagnostics]:
        (lower, upper), advantage = self.bounds(given), targets["advantage"]
        weights = given.until_end.sum(-1) / given.until_end.sum()
        if self.ratio_clip is not None:
            log_ratio = lower.detach() - targets["behaviour_bound"]
            weights = log_ratio.clamp(max=math.log(self.ratio_clip)).softmax(0)
        bound = torch.where(advantage > 0, lower, self.mix * upper + (1 - self.mix) * lower)
        return -(weights * advantage * bound).sum(), {}

    def bounds(self, given: Scoring) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """The lower and the upper bound of log p per token."""
        counted, draw = given.until_end, torch.arange(self.draws, device=given.keys.device)
        masks = block_random_masks(
            given.keys, counted, draws=self.draws, block_length=self.block_length, perturbation=PERTURBATION
        )
        # Each draw is a row of its own, since each has other tokens of the prompt masked.
        row = torch.arange(len(given.rows), device=given.keys.device).repeat_interleave(self.draws)
        each = replace(given, rows=given.rows[row], keys=fold_in(given.keys[:, None], draw).flatten()).perturbed()
        at = masks & counted[:, None]
        log_prob = each.log_probs(masks.flatten(0, 1)[:, None], at=at.flatten(0, 1)[:, None]).view_as(masks)
        lower = (log_prob.sum(-1) / at.sum(-1)).mean(-1)
        return lower, mean_eubo(log_prob, masks, counted, beta=self.eubo_beta)
