"""ESPO, ELBO-based sequence-level policy optimisation (arXiv 2512.03759; ML-GSAI/ESPO, espo_trainer.py)."""

from jaxtyping import Float, Int
from torch import Tensor

from dmpo_lightning.functional import (
    clipped_surrogate,
    complementary_elbo,
    complementary_masks,
    k2,
    leave_one_out_advantage,
)
from dmpo_lightning.objectives.policy_gradient import PolicyGradient, sampled_tokens
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows, check_counts


class ESPO(PolicyGradient):
    """``mean [-min(rho A, clip(rho) A) + beta (E - E_ref)^2 / 2L]``, ``rho = exp((E - E_old) / L)`` per completion.

    E is the ELBO of the whole completion of L tokens (`complementary_elbo`), A = r - mean of the others. At theta = old
    the gradient is that of `WDCE` with the signal A and log p for both signs, on nearly the same maskings.

    Published counts are spread over the rollouts of a batch; here each is drawn from its rollout's key alone.

    Args:
        epsilon: see `PolicyGradient`.
        beta: see `PolicyGradient`.
        mask_draws: see `PolicyGradient`.
        pairs: masks with their complements of each estimate.
    """

    advantage = staticmethod(leave_one_out_advantage)

    def __init__(self, *, epsilon: float = 0.2, beta: float = 1e-3, mask_draws: int = 1, pairs: int = 2) -> None:
        super().__init__(epsilon=epsilon, beta=beta, mask_draws=mask_draws)
        check_counts(pairs=pairs)
        self.pairs = pairs

    def log_probs(
        self, policy: Policy, rows: RolloutRows, keys: Int[Tensor, " rows"], *, reference: bool = False
    ) -> Float[Tensor, " rows"]:
        masks = complementary_masks(keys, sampled_tokens(policy, rows), pairs=self.pairs)
        log_prob = policy.completion_log_probs(
            rows.prompt_ids, rows.prompt_mask, rows.completion_ids, masks.flatten(1, 2), reference=reference
        )
        return complementary_elbo(log_prob.view_as(masks), masks)

    def surrogate(
        self, log_ratio: Float[Tensor, " rows"], advantage: Float[Tensor, " rows"], length: int
    ) -> Float[Tensor, " rows"]:
        return clipped_surrogate(log_ratio / length, advantage, self.epsilon)

    def divergence(self, log_ratio: Float[Tensor, " rows"], length: int) -> Float[Tensor, " rows"]:
        return k2(log_ratio) / length
