"""Optimizer steps that are left out because a gradient is not finite, on all ranks alike."""

from collections.abc import Iterable

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn


class SkippedSteps:
    """Counts them.

    Args:
        limit: in a row.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = self.in_a_row = 0

    def taken(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def skipped(self, step: int) -> None:
        """A step was left out, which is said."""
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        rank_zero_warn(
            f"A gradient is not finite: optimizer step {step} was left out, {self.total} so far, {self.in_a_row} in a "
            "row."
        )

    @property
    def too_many(self) -> bool:
        """Whether the run should end."""
        return self.in_a_row > self.limit


def gradients_are_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether all gradients (of sharded parameters: this rank's parts) are finite."""
    gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in parameters if p.grad is not None]
    return bool(nn.utils.get_total_norm(gradients).isfinite())
