"""GDSD, guided denoiser self-distillation (arXiv 2605.29398; GaryBall/GDSD, gdsd_trainer_batchll.py)."""

import math

from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional import complementary_masks
from dmpo_lightning.objectives.espo import ESPO
from dmpo_lightning.objectives.policy_gradient import Scoring


class GDSD(ESPO):
    """``mean sum_pairs [(clip(D) / L - psi A)^2 + beta (S - S_ref)^2 / (2 L pairs)]``, D = S - S_old.

    S is half the sum of all tokens' log-probs, each where one of a mask and its complement hides it, unweighted. D is
    held within log(1 -+ epsilon); A = r - mean of the others. A log-ratio is regressed, as in DMPO's kin; but the bound
    is so narrow that what trains is -2 psi A grad S / L, a policy gradient, until D has moved by it.
    """

    epsilon, beta, psi = 4e-4, 1e-3, 10.0

    def log_probs(self, given: Scoring) -> Float[Tensor, "rows ..."]:
        masks = complementary_masks(given.keys, given.blocks >= 0, pairs=self.draws)
        return given.log_probs(masks.flatten(1, 2)).view_as(masks).sum((-2, -1)) / 2

    def surrogate(self, log_ratio: Tensor, advantage: Tensor, length: int) -> Tensor:
        held = log_ratio.clamp(math.log1p(-self.epsilon), math.log1p(self.epsilon))
        return -((held / length - self.psi * advantage) ** 2)

    def divergence(self, log_ratio: Tensor, length: int) -> Tensor:
        return super().divergence(log_ratio, length) / self.draws
