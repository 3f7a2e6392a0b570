"""Weighted denoising cross-entropy with a weight baseline: the objective of DMPO itself."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dmpo_lightning.distributed.ranks import log_mean_exp_over_ranks
from dmpo_lightning.functional import (
    Purpose,
    check_replicates,
    denoising_cross_entropy,
    denoising_likelihood,
    equal_reward_groups,
    fold_in,
    group_baseline,
    log_partition,
    merged_signal,
    negative_baseline,
    negligible,
    no_baseline,
    policy_baseline,
    wdce_loss,
)
from dmpo_lightning.functional.losses import NegativeTerm
from dmpo_lightning.objectives.base import Diagnostics, Targets
from dmpo_lightning.objectives.estimators import LogProbEstimator, masked_log_probs
from dmpo_lightning.objectives.weighted import WeightedObjective
from dmpo_lightning.policy import Policy
from dmpo_lightning.rewards.functions import check_function
from dmpo_lightning.rollout import RolloutRows, Rollouts
from dmpo_lightning.tasks.base import check_choice

BaselineName = Literal["none", "group", "negative", "policy"]
BaselineFunction = Callable[[Tensor, Tensor, Rollouts], Any]
"""Computes the baseline b from weights, log_rnd and the rollouts. All tensors are ``[batch group]``.

It returns a Tensor. Named here, that type would refuse functions without annotations on the command line.
"""
PromptWeight = Literal["equal", "reward"]
"""What the prompts of a buffer count for."""
UninformativeGroups = Literal["skip", "train"]
"""What becomes of groups whose rewards are all equal."""


class WDCE(WeightedObjective):
    """Minimises ``mean (w - b) (1/m) sum_masked -log p_theta`` over fresh random maskings of m tokens (DMPO).

    Rollouts that weigh more than their baseline b become more likely, and those that weigh less become less likely.
    How the latter are pushed down is ``negative_term``. The paper's own form is ``baseline`` negative or group,
    ``negative_term`` log_likelihood and ``uninformative_groups`` train.

    Args:
        reward_temperature: alpha, see `WeightedObjective`.
        prompt_weight: what the weights of a group have as their mean. ``equal``, the paper's, is 1: a group that is all
            wrong imitates itself as much as one that is all right. ``reward`` is the group's mean of exp(r / alpha)
            over that of the buffer on all ranks: prompts without a good rollout have nothing to imitate, and those that
            are solved go on to be imitated. b does not count with them, so that ``group`` pushes all rollouts of a
            prompt without a good one down, by ``baseline_scale``. Rewards must be on one scale for all prompts. It aims
            at the target itself where the reference is refreshed for every buffer. With a fixed one it moves the
            minimum towards the reference, the more the smaller the groups are, and `DMPO` warns.
        baseline: ``none`` (b = 0), ``group`` (b = 1), ``negative`` (the weights of -r), or ``policy`` (the weights
            under which the current policy itself would be the target, refreshed before each optimizer step). Or a
            function of weights, log_rnd and rollouts, which a configuration names by its dotted path.
        baseline_scale: what b is multiplied by, at least 0. While theta is the policy that sampled, and one whose
            probabilities are the same in every order of unmasking, b of ``group`` and ``policy`` is a control variate
            of ``log_likelihood``: its coefficient changes the variance of that gradient and not its mean.
        negative_term: what rollouts of negative signal minimise, see `wdce_loss`. ``likelihood``, the mean of p, is at
            least 0 and leaves alone what the policy does not say anyway. ``log_likelihood``, the paper's, has no lower
            bound.
        uninformative_groups: ``skip`` leaves groups of equal rewards out of the loss, which is divided by all rollouts
            nevertheless. That is exact at the target with ``group`` and ``policy``, and with ``none`` favours rare
            rewards in small groups. ``train`` weighs them as the baseline says: with ``none`` a group that is all wrong
            is imitated like one that is all right. None is ``skip`` with prompt_weight ``equal``, and ``train`` with
            ``reward``, which tells these two apart.
        replicates: the number of random maskings per rollout and step. It must be even when ``antithetic`` is true.
        antithetic: draw the maskings in pairs.
        weight_tolerance: the share of ``sum |w - b|`` of a micro-batch whose rollouts are left out of it, in [0, 1).
            The gradient errs by about that share, or by a few times as much where rollouts pull against each other, as
            `benchmarks/weight_tolerance.py` measures. 0 leaves out rollouts of zero signal alone and changes nothing.
        merge_identical: trains on one of a prompt's identical completions, with the sum of their signals, which leaves
            the gradient's mean as it is. Short answers repeat often, and train several times faster so.
        proximal_coefficient: c, see `WeightedObjective`.
        estimator: of log-probs, see `WeightedObjective`.

    Raises:
        ValueError: a value is outside its range, or two values exclude each other.

    Example:
        >>> from dmpo_lightning import WDCE
        >>> published = WDCE(reward_temperature=0.04, negative_term="log_likelihood", uninformative_groups="train")
    """

    def __init__(
        self,
        *,
        reward_temperature: float,
        prompt_weight: PromptWeight = "equal",
        baseline: BaselineName | BaselineFunction = "group",
        baseline_scale: float = 1.0,
        negative_term: NegativeTerm = "likelihood",
        uninformative_groups: UninformativeGroups | None = None,
        replicates: int = 4,
        antithetic: bool = True,
        weight_tolerance: float = 1e-4,
        merge_identical: bool = False,
        proximal_coefficient: float = 1.0,
        estimator: LogProbEstimator | None = None,
    ) -> None:
        super().__init__(
            reward_temperature=reward_temperature,
            proximal_coefficient=proximal_coefficient,
            estimator=estimator,
        )
        check_baseline(baseline, baseline_scale)
        check_replicates(replicates, antithetic=antithetic)
        check_choice("negative_term", negative_term, get_args(NegativeTerm))
        check_choice("prompt_weight", prompt_weight, get_args(PromptWeight))
        if uninformative_groups is None:
            uninformative_groups = "train" if prompt_weight == "reward" else "skip"
        check_choice("uninformative_groups", uninformative_groups, get_args(UninformativeGroups))
        if not 0 <= weight_tolerance < 1:
            raise ValueError(f"`weight_tolerance` must be in [0, 1), got {weight_tolerance}.")
        self.prompt_weight, self.baseline, self.baseline_scale = prompt_weight, baseline, baseline_scale
        self.negative_term, self.uninformative_groups = negative_term, uninformative_groups
        self.replicates, self.antithetic, self.weight_tolerance = replicates, antithetic, weight_tolerance
        self.merge_identical = merge_identical

    def prepare(self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int) -> tuple[Targets, Diagnostics]:
        # Diagnostics are those within groups, where prompts that hardly count have an effective sample size too.
        within, log_rnd, diagnostics = self.weigh(policy, rollouts, rows_per_forward=rows_per_forward)
        weights = within * self._prompt_weights(rollouts.reward)
        signal = self._signal(weights, self._baseline(weights, log_rnd, rollouts), rollouts)
        targets = {"weight": weights, "signal": signal, "log_rnd": log_rnd}
        if self.baseline == "policy":
            # Only now is the policy still the one that sampled.
            targets["behaviour_log_prob"] = self.estimator.behaviour_log_prob(
                policy, rollouts, rows_per_forward=rows_per_forward
            )
        return targets, diagnostics

    def _prompt_weights(self, reward: Tensor) -> float | Tensor:
        """What the prompts count for ``[batch 1]``, with mean 1 over the buffers of all ranks."""
        if self.prompt_weight == "equal":
            return 1.0
        own = log_partition(reward, reward_temperature=self.reward_temperature)
        return (own - log_mean_exp_over_ranks(own)).exp().float()[:, None]

    def _signal(self, weights: Tensor, baseline: Tensor, rollouts: Rollouts) -> Tensor:
        """``w - b``, exactly zero in the groups that are left out, and of completions that are merged into another."""
        signal = weights - self.baseline_scale * baseline
        if self.uninformative_groups == "skip":
            signal = signal.masked_fill(equal_reward_groups(rollouts.reward)[:, None], 0)
        return merged_signal(signal, rollouts.completion_ids) if self.merge_identical else signal

    def _baseline(self, weights: Tensor, log_rnd: Tensor, rollouts: Rollouts) -> Tensor:
        if callable(self.baseline):
            return called_baseline(self.baseline, weights, log_rnd, rollouts)
        if self.baseline == "none":
            return no_baseline(rollouts.reward)
        if self.baseline == "negative":
            return negative_baseline(
                weights,
                log_rnd,
                rollouts.reward,
                reward_temperature=self.reward_temperature,
                proximal_coefficient=self.proximal_coefficient,
            )
        # `policy` starts as `group`: until `before_step` refreshes it, the policy is the one that sampled, and its
        # weights are all 1.
        return group_baseline(rollouts.reward)

    def before_step(
        self, policy: Policy, rollouts: Rollouts, targets: Targets, groups: slice, *, rows_per_forward: int
    ) -> None:
        """Refreshes the ``policy`` baseline, on the same masks (or orders) as the log-probs of the behaviour policy."""
        if self.baseline == "policy":
            chosen = rollouts[groups]
            current = self.estimator.log_prob(policy, chosen, rows_per_forward=rows_per_forward)
            baseline = policy_baseline(current, targets["behaviour_log_prob"][groups])
            targets["signal"][groups] = self._signal(targets["weight"][groups], baseline, chosen)

    def loss(
        self, policy: Policy, rows: RolloutRows, targets: Targets, *, iteration: int, planned_rollouts: int
    ) -> tuple[Tensor, Diagnostics]:
        """Takes the loss on fresh masks. Rollouts of negligible signal are left out of the forward."""
        whole = targets["signal"]
        kept = (~negligible(whole, self.weight_tolerance)).nonzero().squeeze(-1)
        # One always stays, even if its signal is zero: every rank has to run this forward, and a backward.
        kept = kept if len(kept) else torch.zeros_like(whole[:1], dtype=torch.int64)
        rows, signal = rows[kept], whole[kept]
        # The pass is part of the key, so that each pass has fresh masks and does not overfit those of the one before.
        keys = fold_in(fold_in(rows.keys, Purpose.LOSS), iteration)
        scored = masked_log_probs(policy, rows, keys, replicates=self.replicates, antithetic=self.antithetic)
        cross_entropy = denoising_cross_entropy(*scored)
        likelihood = None if self.negative_term == "log_likelihood" else denoising_likelihood(*scored)
        loss = wdce_loss(cross_entropy, signal, planned_rollouts=planned_rollouts, likelihood=likelihood)
        # Not 0, by which a micro-batch without any signal would divide.
        mass = whole.abs().sum().clamp(min=torch.finfo(torch.float32).tiny)
        return loss, {
            "policy/cross_entropy": cross_entropy.detach().mean(),
            "weight/dropped_mass": 1 - signal.abs().sum() / mass,
            "weight/skipped_rollouts": torch.tensor(1 - len(kept) / len(whole), dtype=torch.float32),
        }


def check_baseline(baseline: BaselineName | BaselineFunction, scale: float) -> None:
    """Raises ValueError for another name, a function that cannot be called so, or a factor that cannot be."""
    if callable(baseline):
        check_function("baseline", baseline, ("weights", "log_rnd", "rollouts"))
    else:
        check_choice("baseline", baseline, get_args(BaselineName))
    # Written so that NaN, which compares as false with everything, fails.
    if not 0 <= scale < math.inf:
        raise ValueError(f"`baseline_scale` must be finite and at least 0, got {scale}.")


def called_baseline(function: BaselineFunction, weights: Tensor, log_rnd: Tensor, rollouts: Rollouts) -> Tensor:
    """What a function returns, detached.

    Raises:
        ValueError: it is no tensor of the weights' shape.
    """
    baseline = function(weights, log_rnd, rollouts)
    shape = getattr(baseline, "shape", None)
    # Of another shape torch might take it as well, and subtract the numbers of other rollouts.
    if not isinstance(baseline, Tensor) or shape not in (weights.shape, weights[:, :1].shape):
        raise ValueError(
            f"`baseline` must return a tensor of shape {list(weights.shape)} (prompts, group), or with 1 in "
            f"place of the group; got {type(baseline).__name__}{'' if shape is None else f' {list(shape)}'}."
        )
    return baseline.detach()
