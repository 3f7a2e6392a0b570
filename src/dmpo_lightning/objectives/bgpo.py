"""BGPO, boundary-guided policy optimisation (arXiv 2510.11683; yjyddq/DARE, dllm_core_algos.py)."""

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.functional import clipped_surrogate
from dmpo_lightning.objectives.ebpo import EBPO
from dmpo_lightning.objectives.policy_gradient import Scoring


class BGPO(EBPO):
    """``-sum n S / (sum n x draws)`` with a ratio for each of the maskings of `EBPO`, and n tokens up to the end.

    S is ``min(rho A, clip(rho) A)``, and at least 3 A. With D = (E - E_old) / L of one masking, rho is ``1 + D`` for
    A > 0 and ``exp D`` elsewhere: a lower bound of what is maximised that is a sum over maskings, so that published
    code takes one after the other at the memory of one. `WDCE` is linear in its maskings as it is.
    """

    def log_probs(self, given: Scoring) -> Float[Tensor, "rows ..."]:
        return self.elbos(given)

    def weights(self, given: Scoring) -> Float[Tensor, "rows 1"]:
        tokens = given.until_end.sum(-1, keepdim=True)
        return tokens / (tokens.sum() * self.draws)

    def surrogate(self, log_ratio: Tensor, advantage: Tensor, length: int) -> Tensor:
        ratio = torch.where(advantage > 0, 1 + log_ratio / length, (log_ratio / length).exp())
        value = clipped_surrogate(ratio, advantage, self.epsilon)
        return torch.where(advantage < 0, value.maximum(3 * advantage), value)
