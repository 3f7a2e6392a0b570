"""What objectives of others share: advantages, completions as they are scored, clipped ratios, a KL."""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional import (
    Purpose,
    centred_advantage,
    clipped_surrogate,
    fold_in,
    k3,
    trajectory_masks,
    uniforms,
)
from dmpo_lightning.objectives.base import Diagnostics, Objective, Targets, score_rollouts
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows, Rollouts, check_counts
from dmpo_lightning.samplers import Sampler

PERTURBATION = 0.15
"""The share of a prompt's tokens that d1 and those after it mask, which makes several maskings out of one."""


@dataclass(frozen=True)
class Scoring:
    """Completions under one policy, and the keys from which their maskings are drawn."""

    policy: Policy
    rows: RolloutRows
    keys: Int[Tensor, " rows"]
    reference: bool = False

    @property
    def until_end(self) -> Bool[Tensor, "rows length"]:
        """True up to and with the first end token of each completion."""
        places = torch.arange(self.rows.completion_ids.shape[1], device=self.keys.device)
        return places <= self.policy.effective_length(self.rows.completion_ids)[:, None]

    @property
    def blocks(self) -> Int[Tensor, "rows length"]:
        """The block of each token, 0 of all in a bidirectional model, and -1 of what block-causal ones never draw."""
        found = self.policy.completion_blocks(self.rows.prompt_mask, self.rows.completion_ids)
        return torch.zeros_like(self.rows.completion_ids) if found is None else found

    def log_probs(
        self, masks: Bool[Tensor, "rows draws length"], *, at: Bool[Tensor, "rows draws length"] | None = None
    ) -> Float[Tensor, "rows draws length"]:
        """Log-probs of the masked tokens, or of those of them that are True in ``at``, and 0 elsewhere."""
        prompt, attended, ids = self.rows.prompt_ids, self.rows.prompt_mask, self.rows.completion_ids
        return self.policy.completion_log_probs(prompt, attended, ids, masks, at=at, reference=self.reference)

    def perturbed(self) -> "Scoring":
        """The same with `PERTURBATION` of each prompt masked."""
        prompt = self.rows.prompt_ids
        hidden = uniforms(fold_in(self.keys, Purpose.PROMPT), prompt.shape[1]) < PERTURBATION
        masked = prompt.masked_fill(hidden & self.rows.prompt_mask, self.policy.facts.mask_token_id)
        return replace(self, rows=replace(self.rows, prompt_ids=masked))

    def mean_field(self) -> Float[Tensor, "rows length"]:
        """Log-probs up to the end with all tokens masked: what the first denoising step says, each by itself; d1."""
        counted = self.until_end[:, None]
        return self.perturbed().log_probs(torch.ones_like(counted), at=counted)[:, 0]

    def along(self, step: Int[Tensor, "rows length"], at: Bool[Tensor, "rows length"]) -> Float[Tensor, "rows length"]:
        """The log-prob of each token of ``at`` in the state before its step. Each state takes a row of a forward.

        If the order depends on the tokens, their sum is a likelihood given the order. What the policy says about the
        order itself is left out, though that of a confidence sampler moves with it.
        """
        masks, revealed = trajectory_masks(step, int(step.max()) + 1)
        return self.log_probs(masks, at=revealed & at[:, None]).sum(1)


class AdvantageObjective(Objective):
    """Weighs rollouts by an advantage within their group. A subclass has `micro_batch_loss`."""

    advantage = staticmethod(centred_advantage)
    """From rewards ``[batch group]`` to what rollouts weigh."""
    mask_draws: int | None = None
    """How many maskings a buffer has, which its passes take in turn. None has new ones in each pass."""

    def validate(self, *, group_size: int, sampler: Sampler) -> None:
        if group_size < 2:
            raise ValueError(f"`group_size` must be at least 2, whose rollouts are compared, got {group_size}.")

    def prepare(self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int) -> tuple[Targets, Diagnostics]:
        return {"advantage": self.advantage(rollouts.reward)}, {}

    @abstractmethod
    def micro_batch_loss(self, given: Scoring, targets: Targets) -> tuple[Tensor, Diagnostics]:
        """The loss on the maskings of ``given``, and what to log. Targets named ``_log_prob`` are those on them."""

    def loss(
        self, policy: Policy, rows: RolloutRows, targets: Targets, *, iteration: int, planned_rollouts: int
    ) -> tuple[Tensor, Diagnostics]:
        draw = iteration if self.mask_draws is None else iteration % self.mask_draws
        own = {name: each[:, draw] if name.endswith("_log_prob") else each for name, each in targets.items()}
        return self.micro_batch_loss(Scoring(policy, rows, draw_keys(rows, draw)), own)


class PolicyGradient(AdvantageObjective):
    """Maximises ``min(rho A, clip(rho) A) - beta KL`` with ``rho = exp(log p_theta - log p_old)`` (GRPO and kin).

    A subclass has `log_probs` of its units (tokens, completions or maskings), and may change what they count for, the
    advantage, ratio or KL. Unlike `WDCE` it aims at no distribution: without the KL its optimum is the best completion.

    Args:
        epsilon: how far the ratio may move, at least 0. None is the published one.
        beta: the weight of the KL, at least 0. None is the published one. With 0 nothing is asked of the reference.
        draws: maskings of each estimate, or pairs of them, where a method has several. None is the published number.
        mask_draws: how many sets of them a buffer has, which its passes take in turn. Policy, behaviour policy and
            reference share them; the last two are scored on all, once per buffer. Published is `num_iterations`.

    Raises:
        ValueError: a value is outside its range.
    """

    epsilon: float
    beta: float = 0.0
    draws: int = 1
    mask_draws: int

    def __init__(
        self, *, epsilon: float | None = None, beta: float | None = None, draws: int | None = None, mask_draws: int = 1
    ) -> None:
        self.epsilon = self.epsilon if epsilon is None else epsilon
        self.beta = self.beta if beta is None else beta
        self.draws = self.draws if draws is None else draws
        if not (0 <= self.epsilon < torch.inf and 0 <= self.beta < torch.inf):
            raise ValueError(f"`epsilon` and `beta` must be at least 0 and finite, got {epsilon} and {beta}.")
        check_counts(mask_draws=mask_draws, draws=draws)
        self.mask_draws = mask_draws

    @abstractmethod
    def log_probs(self, given: Scoring) -> Float[Tensor, "rows ..."]:
        """The log-probs of each unit, in nats."""

    def weights(self, given: Scoring) -> Float[Tensor, "..."]:
        """What units count for in the loss, in a shape that goes with `log_probs`. By itself each rollout alike."""
        return torch.tensor(1 / len(given.rows), device=given.keys.device)

    def surrogate(self, log_ratio: Tensor, advantage: Tensor, length: int) -> Tensor:
        """What is maximised of each unit. ``length`` is that of the completion with what is behind its end."""
        return clipped_surrogate(log_ratio.exp(), advantage, self.epsilon)

    def divergence(self, log_ratio: Tensor, length: int) -> Tensor:
        """The KL of each unit, of ``log_ratio`` = log p_theta - log p_ref."""
        return k3(log_ratio)

    def prepare(self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int) -> tuple[Targets, Diagnostics]:
        def scored(reference: bool) -> Tensor:
            def each(rows: RolloutRows) -> Tensor:
                given = [Scoring(policy, rows, draw_keys(rows, draw), reference) for draw in range(self.mask_draws)]
                return torch.stack([self.log_probs(one) for one in given], dim=1)

            return score_rollouts(each, rollouts, rows_per_forward)

        targets = {"advantage": self.advantage(rollouts.reward), "behaviour_log_prob": scored(False)}
        if self.beta:
            same = policy.reference_equals_policy()
            targets["reference_log_prob"] = targets["behaviour_log_prob"] if same else scored(True)
        return targets, {}

    def micro_batch_loss(self, given: Scoring, targets: Targets) -> tuple[Tensor, Diagnostics]:
        length = given.rows.completion_ids.shape[1]
        log_probs, weights = self.log_probs(given), self.weights(given)
        log_ratio = log_probs - targets["behaviour_log_prob"]
        advantage = targets["advantage"].view(-1, *[1] * (log_ratio.dim() - 1)).expand_as(log_ratio)
        value = -self.surrogate(log_ratio, advantage, length)
        diagnostics = {"policy/log_ratio": (log_ratio * weights).sum().detach()}
        if self.beta:
            divergence = self.divergence(log_probs - targets["reference_log_prob"], length)
            value = value + self.beta * divergence
            diagnostics["policy/kl"] = (divergence * weights).sum().detach()
        return (value * weights).sum(), diagnostics


def draw_keys(rows: RolloutRows, draw: int) -> Int[Tensor, " rows"]:
    """The keys of the ``draw``-th masking of a buffer."""
    return fold_in(fold_in(rows.keys, Purpose.LOSS), draw)
