"""TraceRL, policy gradients along the sampled trajectory (arXiv 2509.06949; Gen-Verse/dLLM-RL, rl_llada.py)."""

from functools import partial

from jaxtyping import Float, Int
from torch import Tensor

from dmpo_lightning.functional import clipped_surrogate, k3, merged_steps, z_score_advantage
from dmpo_lightning.functional.masking import block_sums
from dmpo_lightning.objectives.base import Diagnostics, Targets
from dmpo_lightning.objectives.policy_gradient import PolicyGradient, Scoring
from dmpo_lightning.rollout import check_counts
from dmpo_lightning.samplers import Sampler


class TraceRL(PolicyGradient):
    """``mean over states of sum_k [-min(rho A, clip(rho) A) / n + beta_old k3]`` over the n tokens of a state.

    States are those of the recorded trajectory, ``shrink`` neighbouring steps as one, each a row of a forward. The KL
    is to the policy that sampled, A = (r - mean r) / std, and the likelihood one given the order, see `Scoring.along`.
    With a random order `TrajectoryEstimator` gives `WDCE` the same.

    Args:
        epsilon: see `PolicyGradient`.
        beta_old: the weight of the KL to the policy that sampled.
        shrink: steps that are scored as one. Published are 8 for LLaDA and 1 for block-causal models.

    Raises:
        ValueError: a value is outside its range, or the sampler writes tokens anew.
    """

    advantage = staticmethod(partial(z_score_advantage, correction=0))
    epsilon = 0.2

    def __init__(self, *, epsilon: float | None = None, beta_old: float = 0.01, shrink: int = 8) -> None:
        super().__init__(epsilon=epsilon, beta=0.0)
        check_counts(shrink=shrink)
        self.beta_old, self.shrink = beta_old, shrink

    def validate(self, *, group_size: int, sampler: Sampler) -> None:
        super().validate(group_size=group_size, sampler=sampler)
        if sampler.rewrites:
            raise ValueError(
                f"TraceRL trains along the order in which tokens were revealed, which {sampler!r} does not keep; leave "
                "out `editing_threshold`, which is for evaluation."
            )

    def log_probs(self, given: Scoring) -> Float[Tensor, "rows length"]:
        return given.along(self._states(given), given.until_end)

    def _states(self, given: Scoring) -> Int[Tensor, "rows length"]:
        return merged_steps(given.policy.replayed_steps(given.rows.reveal_step), self.shrink)

    def micro_batch_loss(self, given: Scoring, targets: Targets) -> tuple[Tensor, Diagnostics]:
        log_ratio, step = self.log_probs(given) - targets["behaviour_log_prob"], self._states(given)
        advantage = targets["advantage"][:, None].expand_as(log_ratio)
        surrogate = clipped_surrogate(log_ratio.exp(), advantage, self.epsilon)
        counted = given.until_end & (step >= 0)
        # 1 / n. Their sum is the number of states that reveal a token that counts.
        share = counted / block_sums(counted.long(), step).clamp(min=1)
        loss = (self.beta_old * k3(log_ratio) * counted - surrogate * share).sum() / share.sum()
        return loss, {"policy/log_ratio": (log_ratio * share).sum().detach() / share.sum()}
