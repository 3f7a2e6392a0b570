"""diffu-GRPO, the objective of d1 (arXiv 2504.12216; dllm-reasoning/d1, diffu_grpo_trainer.py)."""

from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.objectives.policy_gradient import PolicyGradient, Scoring


class DiffuGRPO(PolicyGradient):
    """``sum [-min(rho A, clip(rho) A) + beta k3] / tokens`` with a ratio per token; A = r - mean r.

    Tokens are scored by `Scoring.mean_field`, and count up to and with the first end token, over the micro-batch alike.
    `WDCE` scores them at all maskings; its w - b has the place of A, and needs no ratio to stay right when the policy
    moves.
    """

    epsilon, beta = 0.5, 0.04

    def log_probs(self, given: Scoring) -> Float[Tensor, "rows length"]:
        return given.mean_field()

    def weights(self, given: Scoring) -> Float[Tensor, "rows length"]:
        return given.until_end / given.until_end.sum()
