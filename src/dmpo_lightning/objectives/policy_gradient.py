"""What clipped policy-gradient methods share: what is scored once per buffer, the ratio, the KL to the reference."""

from abc import abstractmethod
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional import Purpose, centred_advantage, clipped_surrogate, fold_in, k3, uniforms
from dmpo_lightning.objectives.base import Diagnostics, Objective, Targets, score_rollouts
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows, Rollouts, check_counts
from dmpo_lightning.samplers import Sampler


class PolicyGradient(Objective):
    """Maximises ``min(rho A, clip(rho) A) - beta KL`` with ``rho = exp(log p_theta - log p_old)`` (GRPO and kin).

    A subclass says of which units (tokens, completions or maskings) `log_probs` are, what they count for (`weights`),
    and where it differs: the advantage, the ratio (`surrogate`) or the KL (`divergence`). Unlike `WDCE` it aims at no
    distribution. Without the KL its optimum is all mass on the best completion.

    Args:
        epsilon: how far the ratio may move, at least 0.
        beta: the weight of the KL, at least 0. With 0 nothing is asked of the reference.
        mask_draws: how many maskings a buffer has, which its passes take in turn. Policy, behaviour policy and
            reference share them, and the last two are scored on all of them once per buffer. Published are as many as
            `DMPO.num_iterations`.

    Raises:
        ValueError: a value is outside its range.
    """

    advantage = staticmethod(centred_advantage)
    """From the rewards ``[batch group]`` to advantages of the same shape."""

    def __init__(self, *, epsilon: float, beta: float, mask_draws: int = 1) -> None:
        # Written so that NaN, which compares as false with everything, fails.
        for name, value in (("epsilon", epsilon), ("beta", beta)):
            if not 0 <= value < torch.inf:
                raise ValueError(f"`{name}` must be at least 0 and finite, got {value}.")
        check_counts(mask_draws=mask_draws)
        self.epsilon, self.beta, self.mask_draws = epsilon, beta, mask_draws

    def validate(self, *, group_size: int, sampler: Sampler) -> None:
        check_group_size(group_size)

    @abstractmethod
    def log_probs(
        self, policy: Policy, rows: RolloutRows, keys: Int[Tensor, " rows"], *, reference: bool = False
    ) -> Float[Tensor, "rows ..."]:
        """The log-probs of each unit, in nats. What is random in them is drawn from ``keys``."""

    def weights(self, policy: Policy, rows: RolloutRows, planned_rollouts: int) -> Float[Tensor, "..."]:
        """What units count for in the loss, of a shape that goes with `log_probs`. By itself each rollout alike."""
        return torch.tensor(1 / planned_rollouts, device=rows.keys.device)

    def surrogate(
        self, log_ratio: Float[Tensor, "rows ..."], advantage: Float[Tensor, "rows ..."], length: int
    ) -> Float[Tensor, "rows ..."]:
        """What is maximised of each unit. ``length`` is the tokens of a completion, those behind its end included."""
        return clipped_surrogate(log_ratio, advantage, self.epsilon)

    def divergence(self, log_ratio: Float[Tensor, "rows ..."], length: int) -> Float[Tensor, "rows ..."]:
        """The KL of each unit, of ``log_ratio`` = log p_theta - log p_ref."""
        return k3(log_ratio)

    def prepare(self, policy: Policy, rollouts: Rollouts, *, rows_per_forward: int) -> tuple[Targets, Diagnostics]:
        def scored(reference: bool) -> Tensor:
            draws = []
            for draw in range(self.mask_draws):
                score = partial(self._draw_log_probs, policy, draw, reference)
                draws.append(score_rollouts(score, rollouts, rows_per_forward))
            return torch.stack(draws, dim=2)

        targets = {"advantage": self.advantage(rollouts.reward), "behaviour_log_prob": scored(False)}
        if self.beta:
            # As in `LogProbEstimator.log_rnd`, the answer is that of all ranks together.
            same = policy.reference_equals_policy()
            targets["reference_log_prob"] = targets["behaviour_log_prob"] if same else scored(True)
        return targets, {}

    def _draw_log_probs(self, policy: Policy, draw: int, reference: bool, rows: RolloutRows) -> Tensor:
        return self.log_probs(policy, rows, draw_keys(rows, draw), reference=reference)

    def loss(
        self, policy: Policy, rows: RolloutRows, targets: Targets, *, iteration: int, planned_rollouts: int
    ) -> tuple[Tensor, Diagnostics]:
        draw, length = iteration % self.mask_draws, rows.completion_ids.shape[1]
        log_probs = self._draw_log_probs(policy, draw, False, rows)
        log_ratio = log_probs - targets["behaviour_log_prob"][:, draw]
        advantage = targets["advantage"].view(-1, *[1] * (log_ratio.dim() - 1)).expand_as(log_ratio)
        value, weights = -self.surrogate(log_ratio, advantage, length), self.weights(policy, rows, planned_rollouts)
        diagnostics = {"policy/log_ratio": (log_ratio * weights).sum().detach()}
        if self.beta:
            divergence = self.divergence(log_probs - targets["reference_log_prob"][:, draw], length)
            value = value + self.beta * divergence
            diagnostics["policy/kl"] = (divergence * weights).sum().detach()
        return (value * weights).sum(), diagnostics


def check_group_size(group_size: int) -> None:
    """Raises ValueError for groups in which nothing can be compared."""
    if group_size < 2:
        raise ValueError(
            f"`group_size` must be at least 2: advantages compare the rollouts of one prompt, got {group_size}."
        )


def draw_keys(rows: RolloutRows, draw: int) -> Int[Tensor, " rows"]:
    """The keys of the ``draw``-th masking of a buffer."""
    return fold_in(fold_in(rows.keys, Purpose.LOSS), draw)


def until_end(policy: Policy, rows: RolloutRows) -> Bool[Tensor, "rows length"]:
    """True up to and with the first end token of each completion, which is what most published code counts."""
    places = torch.arange(rows.completion_ids.shape[1], device=rows.completion_ids.device)
    return places <= policy.effective_length(rows.completion_ids)[:, None]


def sampled_tokens(policy: Policy, rows: RolloutRows) -> Bool[Tensor, "rows length"]:
    """True for all that was sampled: the whole completion, and of block-causal models the blocks up to its end."""
    blocks = policy.completion_blocks(rows.prompt_mask, rows.completion_ids)
    return torch.ones_like(rows.completion_ids, dtype=torch.bool) if blocks is None else blocks >= 0


def token_mean(policy: Policy, rows: RolloutRows) -> Float[Tensor, "rows length"]:
    """Weights of the tokens that `until_end` counts, each alike over the micro-batch. Long completions weigh more."""
    counted = until_end(policy, rows)
    return counted / counted.sum()


def mean_field_log_probs(
    policy: Policy,
    rows: RolloutRows,
    keys: Int[Tensor, " rows"],
    *,
    prompt_masking: float,
    reference: bool = False,
) -> Float[Tensor, "rows length"]:
    """Each token's log-prob with the whole completion masked, in one forward, 0 behind the end; d1 (arXiv 2504.12216).

    It is the first denoising step's view of all tokens, and knows nothing of how they depend on each other.
    """
    prompt = masked_prompt(policy, rows, keys, prompt_masking)
    masks = torch.ones_like(rows.completion_ids, dtype=torch.bool)[:, None]
    return policy.completion_log_probs(
        prompt, rows.prompt_mask, rows.completion_ids, masks, at=until_end(policy, rows)[:, None], reference=reference
    )[:, 0]


def masked_prompt(
    policy: Policy, rows: RolloutRows, keys: Int[Tensor, " rows"], probability: float
) -> Int[Tensor, "rows prompt"]:
    """The prompts with each token masked with ``probability``, which makes several maskings out of one (d1)."""
    draws = uniforms(fold_in(keys, Purpose.PROMPT), rows.prompt_ids.shape[1])
    return torch.where((draws < probability) & rows.prompt_mask, policy.facts.mask_token_id, rows.prompt_ids)
