"""EBPO, ELBO-based block-level policy optimisation (LLaDA2.1, arXiv 2602.08676; yjyddq/DARE, ebpo_actor_mixin.py)."""

from functools import partial

from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional import draw_masks, elbo_replicates, k2, z_score_advantage
from dmpo_lightning.objectives.policy_gradient import PolicyGradient, Scoring


class EBPO(PolicyGradient):
    """``mean [-min(rho A, clip(rho) A) + beta (E - E_ref)^2 / 2]`` with ``rho = exp(E - E_old)`` per completion.

    E sums the ELBOs of a block-causal model's blocks up to the end, as `WDCE` does; a bidirectional model has one
    block. A = (r - mean r) / (std + 1e-6). Published mask counts are spread evenly over maskings and blocks; here
    maskings are the antithetic pairs of `draw_masks`.
    """

    epsilon, draws = 0.2, 16
    advantage = staticmethod(partial(z_score_advantage, floor=1e-6))

    def elbos(self, given: Scoring) -> Float[Tensor, "rows draws"]:
        """The ELBO of each masking, in nats."""
        blocks = given.blocks.where(given.until_end, -1)
        masks = draw_masks(given.keys, length=blocks.shape[1], replicates=self.draws, blocks=blocks)
        return elbo_replicates(given.log_probs(masks), masks, blocks)

    def log_probs(self, given: Scoring) -> Float[Tensor, "rows ..."]:
        return self.elbos(given).mean(-1)

    def divergence(self, log_ratio: Tensor, length: int) -> Tensor:
        return k2(log_ratio)
