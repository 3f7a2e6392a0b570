"""GDPO, group diffusion policy optimisation (arXiv 2510.08554; KevinRojas1499/GDPO, gdpo_trainer.py)."""

from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional import centred_advantage, k3, quadrature_elbo, quadrature_masks
from dmpo_lightning.objectives.espo import ESPO
from dmpo_lightning.objectives.policy_gradient import Scoring


class GDPO(ESPO):
    """The ratio of `ESPO` on another ELBO; A = r - mean r, and a KL, if any, of ``k3(E - E_ref)``.

    E is the ELBO of the whole completion by a quadrature over the mask ratio (`quadrature_elbo`).
    """

    epsilon, beta = 0.5, 0.0
    advantage = staticmethod(centred_advantage)

    def log_probs(self, given: Scoring) -> Float[Tensor, "rows ..."]:
        masks = quadrature_masks(given.keys, given.blocks >= 0)
        return quadrature_elbo(given.log_probs(masks), masks)

    def divergence(self, log_ratio: Tensor, length: int) -> Tensor:
        return k3(log_ratio)
