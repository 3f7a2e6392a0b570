"""ESPO, ELBO-based sequence-level policy optimisation (arXiv 2512.03759; ML-GSAI/ESPO, espo_trainer.py)."""

from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional import (
    clipped_surrogate,
    complementary_elbo,
    complementary_masks,
    k2,
    leave_one_out_advantage,
)
from dmpo_lightning.objectives.policy_gradient import PolicyGradient, Scoring


class ESPO(PolicyGradient):
    """``mean [-min(rho A, clip(rho) A) + beta (E - E_ref)^2 / 2L]``, ``rho = exp((E - E_old) / L)`` per completion.

    E is the ELBO of all L tokens on two pairs of masks (`complementary_elbo`), whose counts are drawn for each rollout,
    not spread over a batch; A = r - mean of the others. At theta = old the gradient is that of `WDCE` with the signal A
    and log p for both signs, on nearly the same maskings.
    """

    epsilon, beta, draws = 0.2, 1e-3, 2
    advantage = staticmethod(leave_one_out_advantage)

    def log_probs(self, given: Scoring) -> Float[Tensor, "rows ..."]:
        masks = complementary_masks(given.keys, given.blocks >= 0, pairs=self.draws)
        return complementary_elbo(given.log_probs(masks.flatten(1, 2)).view_as(masks), masks)

    def surrogate(self, log_ratio: Tensor, advantage: Tensor, length: int) -> Tensor:
        return clipped_surrogate((log_ratio / length).exp(), advantage, self.epsilon)

    def divergence(self, log_ratio: Tensor, length: int) -> Tensor:
        return k2(log_ratio) / length
