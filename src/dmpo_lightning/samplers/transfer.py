"""Which of a block's candidates a denoising step reveals.

The rules are computed for all rows at once, as boolean grids ``[rows block]``, where the published code goes through
the rows one by one.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional.masking import position_ranks
from dmpo_lightning.functional.randomness import Purpose, fold_in, uniforms
from dmpo_lightning.samplers.draws import Draw

Remasking = Literal["low_confidence", "random", "sequential"]


def remasking_scores(
    remasking: Remasking,
    draw: Draw,
    keys: Int[Tensor, " rows"],
    step: int,
    length: int,
    places: Int[Tensor, "rows places"],
) -> Float[Tensor, "rows places"]:
    """The scores by which candidates are kept, the highest first: their confidence, chance, or from left to right."""
    if remasking == "low_confidence":
        return draw.log_odds
    if remasking == "sequential":
        return -places.double()
    return uniforms(fold_in(fold_in(keys, Purpose.REMASKING), step), length).gather(1, places)


def best_of(
    scores: Float[Tensor, "rows block"], masked: Bool[Tensor, "rows block"], count: int
) -> Bool[Tensor, "rows block"]:
    """Chooses the ``count`` highest scores among each row's masked places, or all where there are fewer."""
    return (position_ranks((-scores).masked_fill(~masked, torch.inf)) < count) & masked


def best(scores: Float[Tensor, "rows block"], count: int) -> Int[Tensor, "rows {count}"]:
    """The places of each row's ``count`` highest scores, from the highest down. Of equal scores the left is first."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def above_threshold(
    confidence: Float[Tensor, "rows block"], masked: Bool[Tensor, "rows block"], threshold: float
) -> Bool[Tensor, "rows block"]:
    """Chooses every candidate of at least that confidence, and in any case the best one of each row.

    This is the threshold rule of Fast-dLLM (arXiv 2505.22618).
    """
    candidates = confidence.masked_fill(~masked, -torch.inf)
    # A row without masked places has a best candidate too, by argmax; `& masked` takes it out again.
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
    place = torch.arange(confidence.shape[1], device=confidence.device)
    # The number that pass in a row from the best on; `place` counts from 0, i of the docstring from 1.
    # In float64, as the confidences are and as Python's own numbers are in the published code.
    passes = (ordered >= 1 - factor / (place + 2).double()) | (place == 0)
    count, total = passes.long().cumprod(1).sum(1), masked.sum(1)
    count = torch.where(count >= total - 1, total, count)
    return torch.zeros_like(masked).scatter_(1, order, place < count[:, None]) & masked


def sure_enough(
    draw: Draw, masked: Bool[Tensor, "rows block"], *, threshold: float | None, factor: float | None
) -> Bool[Tensor, "rows block"]:
    """Chooses by the one of the two rules above that is given a number."""
    if threshold is not None:
        return above_threshold(draw.confidence, masked, threshold)
    assert factor is not None
    return within_factor(draw.confidence, masked, factor)


def check_parallel(threshold: float | None, factor: float | None, steps: int | None, remasking: str) -> None:
    """Raises ValueError for unknown remasking and rules of parallel decoding out of range or in conflict."""
    if remasking not in ("low_confidence", "random", "sequential"):
        raise ValueError(f"`remasking` must be low_confidence, random or sequential, got {remasking!r}.")
    if threshold is not None and factor is not None:
        raise ValueError("Set `threshold` or `factor`, not both.")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be a probability in (0, 1], got {threshold}.")
    if factor is not None and not 0 < factor < math.inf:
        raise ValueError(f"`factor` must be positive and finite, got {factor}.")
    if (threshold is not None or factor is not None) and (steps is not None or remasking != "low_confidence"):
        raise ValueError(
            f"`threshold` and `factor` choose the number of steps and compare confidence; leave out denoising_steps "
            f"(got {steps}) and use remasking: low_confidence (got {remasking})."
        )
