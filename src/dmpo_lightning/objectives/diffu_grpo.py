"""diffu-GRPO, the objective of d1 (arXiv 2504.12216; dllm-reasoning/d1, diffu_grpo_trainer.py)."""

from jaxtyping import Float, Int
from torch import Tensor

from dmpo_lightning.objectives.policy_gradient import PolicyGradient, mean_field_log_probs, token_mean
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import RolloutRows


class DiffuGRPO(PolicyGradient):
    """``sum [-min(rho A, clip(rho) A) + beta k3] / tokens`` with a ratio per token; A = r - mean r.

    Tokens are scored by `mean_field_log_probs`. `WDCE` scores the same tokens at all maskings; its signal w - b takes
    the place of A, and no ratio is needed, since its weights stay right when the policy moves.

    Args:
        epsilon: see `PolicyGradient`.
        beta: see `PolicyGradient`.
        mask_draws: see `PolicyGradient`. What differs between maskings is the prompt.
        prompt_masking: the share of the prompt's tokens that are masked, in [0, 1).
    """

    def __init__(
        self, *, epsilon: float = 0.5, beta: float = 0.04, mask_draws: int = 1, prompt_masking: float = 0.15
    ) -> None:
        super().__init__(epsilon=epsilon, beta=beta, mask_draws=mask_draws)
        self.prompt_masking = prompt_masking

    def log_probs(
        self, policy: Policy, rows: RolloutRows, keys: Int[Tensor, " rows"], *, reference: bool = False
    ) -> Float[Tensor, "rows length"]:
        return mean_field_log_probs(policy, rows, keys, prompt_masking=self.prompt_masking, reference=reference)

    def weights(self, policy: Policy, rows: RolloutRows, planned_rollouts: int) -> Float[Tensor, "rows length"]:
        return token_mean(policy, rows)
