"""A mean with its standard error, over ranks."""

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanWithError(Metric):
    """Mean of independent values and its standard error; `compute` returns both."""

    full_state_update = False
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "total", "squares"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Adds values of any shape."""
        values = values.to(self.total).flatten()
        # Not in place: the states may have been made under inference mode and be updated outside of it.
        self.count = self.count + values.numel()
        self.total = self.total + values.sum()
        self.squares = self.squares + values.square().sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean, and sqrt(variance / n)."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0)
        return mean.float(), (variance / self.count).sqrt().float()
