"""An objective of your own: diffu-GRPO of d1 (arXiv 2504.12216). YAML names it by its dotted path.

Run it from this folder: `dmpo-lightning fit --config sudoku_tiny.yaml --model.objective=custom_objective.DiffuGRPO`.
"""

import torch

from dmpo_lightning import Objective
from dmpo_lightning.functional import fold_in, uniforms
from dmpo_lightning.objectives import score_rollouts


class DiffuGRPO(Objective):
    """A clipped policy gradient per token. Tokens are scored in one forward, with the whole completion masked."""

    def __init__(self, clip: float = 0.5, beta: float = 0.04, prompt_masking: float = 0.15) -> None:
        self.clip, self.beta, self.prompt_masking = clip, beta, prompt_masking

    def prepare(self, policy, rollouts, *, rows_per_forward):
        old = score_rollouts(lambda rows: self.log_probs(policy, rows), rollouts, rows_per_forward)
        reference = score_rollouts(lambda rows: self.log_probs(policy, rows, True), rollouts, rows_per_forward)
        advantage = rollouts.reward - rollouts.reward.mean(-1, keepdim=True)
        return {"old": old, "reference": reference, "advantage": advantage}, {"advantage/spread": advantage.std()}

    def loss(self, policy, rows, targets, *, iteration, planned_rollouts):
        new, advantage = self.log_probs(policy, rows), targets["advantage"][:, None]
        ratio, ahead = (new - targets["old"]).exp(), targets["reference"] - new
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        k3 = ahead.exp() - ahead - 1
        loss = self.beta * k3 - torch.minimum(ratio * advantage, clipped * advantage)
        # Tokens count up to the first end token, and that one too.
        places = torch.arange(new.shape[1], device=new.device)
        counts = places <= policy.effective_length(rows.completion_ids)[:, None]
        return (loss * counts).sum() / counts.sum(), {"policy/k3": (k3 * counts).sum().detach() / counts.sum()}

    def log_probs(self, policy, rows, reference=False):
        """Drawn from the rollouts' keys, the masks of a prompt are the same for all three policies."""
        draws = uniforms(fold_in(rows.keys, 0), rows.prompt_ids.shape[1]) < self.prompt_masking
        prompt = torch.where(draws & rows.prompt_mask, policy.facts.mask_token_id, rows.prompt_ids)
        masks = torch.ones_like(rows.completion_ids, dtype=torch.bool)[:, None]
        inputs = prompt, rows.prompt_mask, rows.completion_ids, masks
        return policy.completion_log_probs(*inputs, reference=reference)[:, 0]
