"""Weighted denoising cross-entropy with a weight baseline: the objective of DMPO itself."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dmpo_lightning.distributed.ranks import log_mean_exp_over_ranks
from dmpo_lightning.functional import (
    Purpose,
    check_replicates,
    denoising_cross_entropy,
    denoising_likelihood,
    draw_block_masks,
    draw_masks,
    equal_reward_groups,
    fold_in,
    group_baseline,
    log_partition,
    negative_baseline,
    negative_reward_baseline,
    negligible,
    no_baseline,
    policy_baseline,
    wdce_loss,
)
from dmpo_lightning.functional.losses import LossScale, NegativeTerm
from dmpo_lightning.objectives.base import Diagnostics, MaskedPass, ObjectiveFootprint, Targets
from dmpo_lightning.objectives.baseline import BaselineFunction, BaselineName, called_baseline, check_baseline
from dmpo_lightning.objectives.log_rnd import LogProbEstimator, check_unstratified
from dmpo_lightning.objectives.weighted import WeightedObjective, weight_diagnostics
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows, Rollouts
from dmpo_lightning.samplers.base import Sampler
from dmpo_lightning.tasks.base import check_choice

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
            prompt without a good one down, by ``baseline_scale``. Rewards must be on one scale for all prompts.
        baseline: ``none`` (b = 0), ``group`` (b = 1), ``negative`` (the weights of -r), or ``policy`` (the weights
            under which the current policy itself would be the target, renewed before each optimizer step). Or a
            function of weights, log_rnd and rollouts, which a configuration names by its dotted path.
        baseline_scale: what b is multiplied by, at least 0. While theta is the policy that sampled, b is a control
            variate of ``log_likelihood``: its coefficient changes the variance of that gradient and not its mean.
        negative_term: what rollouts of negative signal minimise, see `wdce_loss`. ``likelihood``, the mean of p, is at
            least 0 and leaves alone what the policy does not say anyway. ``likelihood_ratio``, the mean of p / p_old,
            is also at least 0, and its gradient at theta = old is the paper's; it costs one more pass over each buffer,
            all passes use the same maskings, and it destroyed the embedded model (docs/results.md). ``log_likelihood``,
            the paper's, has no lower bound.
        uninformative_groups: ``skip`` leaves groups of equal rewards out of the loss, which is divided by all rollouts
            nevertheless. ``train`` weighs them as the baseline says: with ``none`` a group that is all wrong is
            imitated like one that is all right. None is ``skip`` with prompt_weight ``equal``, and ``train`` with
            ``reward``, which tells these two apart.
        replicates: the number of random maskings per rollout and step. It must be even when ``antithetic`` is true.
        antithetic: draw the maskings in pairs.
        stratified: draw the counts of a rollout's maskings from equal parts of all counts. Not with ``block_length``,
            nor with a block-causal model.
        scale: ``count`` takes the mean over masked tokens (1/m), ``length`` the paper's scale (L/m).
        block_length: mask as decoding in blocks of this length meets completions: a random block in part, and all
            behind it. The loss is then taken in that block alone. None masks anywhere.
        weight_tolerance: the share of ``sum |w - b|`` of a micro-batch whose rollouts are left out of it, in [0, 1).
            The gradient errs by about that share, or by a few times as much where rollouts pull against each other, as
            `benchmarks/weight_tolerance.py` measures. 0 leaves out rollouts of zero signal alone and changes nothing.
        reward_scale: eta, see `WeightedObjective`.
        proximal_coefficient: c, see `WeightedObjective`.
        target_ess: see `WeightedObjective`.
        log_prob: the estimator of log-probs, see `WeightedObjective`.

    Raises:
        ValueError: a value is outside its range, or two values exclude each other.
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
        stratified: bool = False,
        scale: LossScale = "count",
        block_length: int | None = None,
        weight_tolerance: float = 1e-4,
        reward_scale: float | None = None,
        proximal_coefficient: float | None = None,
        target_ess: float | None = None,
        log_prob: LogProbEstimator | None = None,
    ) -> None:
        super().__init__(
            reward_temperature=reward_temperature,
            reward_scale=reward_scale,
            proximal_coefficient=proximal_coefficient,
            target_ess=target_ess,
            log_prob=log_prob,
        )
        check_baseline(baseline, baseline_scale, reward_scale)
        check_replicates(replicates, antithetic=antithetic)
        check_choice("scale", scale, get_args(LossScale))
        check_choice("negative_term", negative_term, get_args(NegativeTerm))
        check_choice("prompt_weight", prompt_weight, get_args(PromptWeight))
        if uninformative_groups is None:
            uninformative_groups = "train" if prompt_weight == "reward" else "skip"
        check_choice("uninformative_groups", uninformative_groups, get_args(UninformativeGroups))
        if not 0 <= weight_tolerance < 1:
            raise ValueError(f"`weight_tolerance` must be in [0, 1), got {weight_tolerance}.")
        self.baseline, self.replicates, self.antithetic, self.scale = baseline, replicates, antithetic, scale
        self.block_length, self.weight_tolerance = block_length, weight_tolerance
        if stratified and block_length is not None:
            raise ValueError("`stratified` draws counts over the whole completion; leave it out, or `block_length`.")
        self.stratified = stratified
        self.negative_term, self.uninformative_groups = negative_term, uninformative_groups
        self.prompt_weight, self.baseline_scale = prompt_weight, baseline_scale

    def validate_policy(self, policy: Policy) -> None:
        super().validate_policy(policy)
        check_unstratified(self, self.stratified, policy)
        if self.block_length is not None and policy.block_size is not None:
            raise ValueError(
                f"`block_length` of WDCE must be null with {type(policy.model).__name__}, got {self.block_length}: its "
                f"blocks are its own ({policy.block_size} tokens), and each of them is masked in part anyway."
            )

    def validate(self, *, group_size: int, completion_length: int, sampler: object) -> None:
        super().validate(group_size=group_size, completion_length=completion_length, sampler=sampler)
        block = self.block_length
        if block is not None and (block < 1 or completion_length % block):
            raise ValueError(f"`block_length` must divide the completion length {completion_length}, got {block}.")

    def footprint(
        self, *, completion_length: int, sampler: Sampler, reference_is_current: bool = False
    ) -> ObjectiveFootprint:
        """With ``block_length`` the loss needs log-probs within one block of each masking alone. The ``policy``
        baseline scores the behaviour policy once per buffer and the current one before each optimizer step.
        """
        passes = self.log_rnd_passes(
            completion_length=completion_length, sampler=sampler, reference_is_current=reference_is_current
        )
        training = MaskedPass.over(self.block_length or completion_length, replicates=self.replicates)
        if self.negative_term == "likelihood_ratio":
            passes += (training,)
        renewed: tuple[MaskedPass, ...] = ()
        if self.baseline == "policy":
            renewed = (self.log_prob.footprint(completion_length=completion_length, sampler=sampler),)
            passes += () if self.log_prob.behaviour_is_recorded else renewed
        return ObjectiveFootprint(training=training, per_buffer=passes, per_step=renewed)

    def prepare(self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int) -> tuple[Targets, Diagnostics]:
        log_rnd = self.log_rnd(policy, rollouts, rows_per_forward=rows_per_forward)
        coefficient = self.coefficient(log_rnd, rollouts.reward)
        within = self.weights(log_rnd, rollouts.reward, coefficient)
        weights = within * self._prompt_weights(rollouts.reward)
        baseline = self._baseline(weights, log_rnd, rollouts, coefficient)
        signal = self._signal(weights, baseline, rollouts)
        targets = {"weight": weights, "signal": signal, "log_rnd": log_rnd}
        if self.negative_term == "likelihood_ratio":
            targets["behaviour_token_log_prob"] = self._token_log_probs(policy, rollouts, rows_per_forward)
        if self.baseline == "policy":
            # Only now is the policy still the one that sampled.
            targets["behaviour_log_prob"] = self.log_prob.behaviour_log_prob(
                policy, rollouts, rows_per_forward=rows_per_forward
            )
        # Within groups, where prompts that hardly count have an effective sample size too.
        return targets, weight_diagnostics(within, log_rnd, coefficient)

    def _prompt_weights(self, reward: Tensor) -> float | Tensor:
        """What the prompts count for ``[batch 1]``, with mean 1 over the buffers of all ranks."""
        if self.prompt_weight == "equal":
            return 1.0
        own = log_partition(reward, reward_scale=self.reward_scale or 1 / self.reward_temperature)
        return (own - log_mean_exp_over_ranks(own)).exp().float()[:, None]

    def _signal(self, weights: Tensor, baseline: Tensor, rollouts: Rollouts) -> Tensor:
        """``w - b``, exactly zero in the groups that are left out."""
        signal = weights - self.baseline_scale * baseline
        if self.uninformative_groups == "train":
            return signal
        return signal.masked_fill(equal_reward_groups(rollouts.reward)[:, None], 0)

    def _baseline(self, weights: Tensor, log_rnd: Tensor, rollouts: Rollouts, coefficient: float | Tensor) -> Tensor:
        if callable(self.baseline):
            return called_baseline(self.baseline, weights, log_rnd, rollouts)
        if self.baseline == "none":
            return no_baseline(rollouts.reward)
        if self.baseline == "negative" and self.reward_scale is not None:
            return negative_reward_baseline(weights, rollouts.reward, reward_scale=self.reward_scale)
        if self.baseline == "negative":
            return negative_baseline(
                weights,
                log_rnd,
                rollouts.reward,
                reward_temperature=self.reward_temperature,
                proximal_coefficient=coefficient,
            )
        # `policy` starts as `group`: until `before_step` renews it, the policy is the one that sampled, and its weights
        # are all 1.
        return group_baseline(rollouts.reward)

    def before_step(
        self, policy: Policy, rollouts: Rollouts, targets: Targets, groups: slice, *, rows_per_forward: int
    ) -> None:
        """Renews the ``policy`` baseline, on the same masks (or orders) as the log-probs of the behaviour policy."""
        if self.baseline == "policy":
            chosen = rollouts.groups(groups)
            current = self.log_prob.log_prob(policy, chosen, rows_per_forward=rows_per_forward)
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
        blocks = policy.completion_blocks(rows.prompt_mask, rows.completion_ids)
        masks, predicted = self._masks(rows, iteration, blocks)
        log_prob = self._log_prob(policy, rows, masks, predicted)
        cross_entropy = denoising_cross_entropy(log_prob, predicted, scale=self.scale, blocks=blocks)
        likelihood = None
        if self.negative_term != "log_likelihood":
            behaviour = targets.get("behaviour_token_log_prob")
            likelihood = denoising_likelihood(
                log_prob,
                predicted,
                behaviour_log_prob=None if behaviour is None else behaviour[kept],
                scale=self.scale,
                blocks=blocks,
            )
        loss = wdce_loss(cross_entropy, signal, planned_rollouts=planned_rollouts, likelihood=likelihood)
        # Not 0, by which a micro-batch without any signal would divide.
        mass = whole.abs().sum().clamp(min=torch.finfo(torch.float32).tiny)
        return loss, {
            "policy/cross_entropy": cross_entropy.detach().mean(),
            "weight/dropped_mass": 1 - signal.abs().sum() / mass,
            "weight/skipped_rollouts": torch.tensor(1 - len(kept) / len(whole), dtype=torch.float32),
        }

    def _token_log_probs(self, policy: Policy, rollouts: Rollouts, rows_per_forward: int) -> Tensor:
        """Of the policy that sampled, under the masks of the loss."""
        rows, parts = rollouts.rows(), []
        for start in range(0, len(rows), rows_per_forward):
            chunk = rows[start : start + rows_per_forward]
            blocks = policy.completion_blocks(chunk.prompt_mask, chunk.completion_ids)
            parts.append(self._log_prob(policy, chunk, *self._masks(chunk, 0, blocks)))
        return torch.cat(parts).unflatten(0, rollouts.group_shape)

    def _log_prob(self, policy: Policy, rows: RolloutRows, masks: Tensor, predicted: Tensor) -> Tensor:
        return policy.completion_log_probs(rows.prompt_ids, rows.prompt_mask, rows.completion_ids, masks, at=predicted)

    def _masks(self, rows: RolloutRows, iteration: int, blocks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draws what is masked, and says at which of those positions the loss is taken."""
        # The pass is part of the key, so that each pass has fresh masks and does not overfit those of the one before.
        # A ratio to the policy that sampled needs the masks under which that one was scored.
        drawn = 0 if self.negative_term == "likelihood_ratio" else iteration
        keys, length = fold_in(fold_in(rows.keys, Purpose.LOSS), drawn), rows.completion_ids.shape[1]
        options: Any = {"length": length, "replicates": self.replicates, "antithetic": self.antithetic}
        if self.block_length is not None:
            return draw_block_masks(keys, block_length=self.block_length, **options)
        masks = draw_masks(keys, stratified=self.stratified, blocks=blocks, **options)
        return masks, masks
