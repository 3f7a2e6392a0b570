"""Which of a block's candidates a denoising step reveals: all rows at once, as boolean grids ``[rows block]``."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def best(scores: Float[Tensor, "rows block"], count: int) -> Int[Tensor, "rows {count}"]:
    """The ``count`` highest scores of each row, from the highest down; of equal ones the left comes first."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def above_threshold(
    confidence: Float[Tensor, "rows block"], masked: Bool[Tensor, "rows block"], threshold: float
) -> Bool[Tensor, "rows block"]:
    """Every candidate of at least that confidence, and the best one of each row in any case (Fast-dLLM, arXiv
    2505.22618).
    """
    candidates = confidence.masked_fill(~masked, -torch.inf)
    surest = torch.zeros_like(masked).scatter_(1, candidates.argmax(1, keepdim=True), True)
    return (surest | (candidates >= threshold)) & masked


def within_factor(
    confidence: Float[Tensor, "rows block"], masked: Bool[Tensor, "rows block"], factor: float
) -> Bool[Tensor, "rows block"]:
    """The n best candidates, n the largest with ``(i + 1) (1 - confidence_i) <= factor`` for each i in 2..n.

    The rule of Fast-dLLM (arXiv 2505.22618), with a peculiarity of its code: where only the last candidate of a row
    fails, it is revealed as well.
    """
    candidates = confidence.masked_fill(~masked, -torch.inf)
    ordered, order = candidates.sort(dim=1, descending=True, stable=True)
    place = torch.arange(confidence.shape[1], device=confidence.device)
    passes = (ordered >= 1 - factor / (place + 2)) | (place == 0)
    count, total = passes.long().cumprod(1).sum(1), masked.sum(1)
    count = torch.where(count >= total - 1, total, count)
    return torch.zeros_like(masked).scatter_(1, order, place < count[:, None]) & masked
