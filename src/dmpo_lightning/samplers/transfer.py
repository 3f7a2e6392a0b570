"""Which of a block's candidates a denoising step reveals.

The rules are computed for all rows at once, as boolean grids ``[rows block]``, where the published code goes through
the rows one by one.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dmpo_lightning.functional.masking import position_ranks


def best_of(
    scores: Float[Tensor, "rows block"], masked: Bool[Tensor, "rows block"], count: int
) -> Bool[Tensor, "rows block"]:
    """Chooses the ``count`` highest scores among each row's masked positions, or all where there are fewer."""
    return (position_ranks((-scores).masked_fill(~masked, torch.inf)) < count) & masked


def above_threshold(
    confidence: Float[Tensor, "rows block"], masked: Bool[Tensor, "rows block"], threshold: float
) -> Bool[Tensor, "rows block"]:
    """Chooses every candidate of at least that confidence, and in any case the best one of each row.

    This is the threshold rule of Fast-dLLM (arXiv 2505.22618).
    """
    candidates = confidence.masked_fill(~masked, -torch.inf)
    # A row without masked positions has a best candidate too, by argmax; `& masked` takes it out again.
    surest = torch.zeros_like(masked).scatter_(1, candidates.argmax(1, keepdim=True), True)
    return (surest | (candidates >= threshold)) & masked


def within_factor(
    confidence: Float[Tensor, "rows block"], masked: Bool[Tensor, "rows block"], factor: float
) -> Bool[Tensor, "rows block"]:
    """Chooses the n best candidates of each row, with n the largest such that each of them is sure enough for n.

    The i-th best is sure enough if ``(i + 1) (1 - confidence_i) <= factor``. The best one is taken in any case. This is
    the factor rule of Fast-dLLM (arXiv 2505.22618), with a peculiarity of its code: where only the last candidate of a
    row fails, it is revealed as well.
    """
    candidates = confidence.masked_fill(~masked, -torch.inf)
    ordered, order = candidates.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(confidence.shape[1], device=confidence.device)
    # The number that pass in a row from the best on; `rank` counts from 0, i of the docstring from 1.
    # In float64, as the confidences are and as Python's own numbers are in the published code.
    passes = (ordered >= 1 - factor / (rank + 2).double()) | (rank == 0)
    count, total = passes.long().cumprod(1).sum(1), masked.sum(1)
    count = torch.where(count >= total - 1, total, count)
    return torch.zeros_like(masked).scatter_(1, order, rank < count[:, None]) & masked
