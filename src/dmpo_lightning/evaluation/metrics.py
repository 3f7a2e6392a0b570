"""What an evaluation counts, over batches and ranks: means with standard errors, throughput."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from dmpo_lightning.distributed.ranks import gather_ranks, means_over_ranks
from dmpo_lightning.rewards.scores import Scores

if TYPE_CHECKING:
    from dmpo_lightning.evaluation.batch import EvaluatedBatch


SUMS = torch.float64
"""Of sums over an evaluation: in half precision, which a Trainer may make the default, 256 + 1 is 256."""


class MeanWithError(Metric):
    """Mean over prompts and its standard error.

    `compute` returns both. The mean is NaN if there were no values, and the error if there was at most one. Prompts are
    the independent unit: the completions of one are averaged first, which Miller 2024 (arXiv 2411.00640) calls
    clustering. NaN is a value that does not apply and is left out. With weights, mean and error are those of the ratio
    of sums, such as right parts over all parts.
    """

    full_state_update = False
    count: Tensor
    weight: Tensor
    total: Tensor
    weight_squares: Tensor
    cross: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "weight", "total", "weight_squares", "cross", "squares"):
            self.add_state(name, torch.tensor(0.0, dtype=SUMS), dist_reduce_fx="sum")

    def update(
        self, values: Float[Tensor, "prompts completions"], weights: Float[Tensor, " prompts"] | None = None
    ) -> None:
        """Adds prompts, each with the weight 1 unless ``weights`` says otherwise."""
        means = values.to(self.total).nanmean(-1)
        w = torch.ones_like(means) if weights is None else weights.to(means)
        applies = ~means.isnan()
        x, w = means[applies], w[applies]
        # Not in place: the states may have been made under inference mode and be updated outside of it.
        self.count = self.count + x.numel()
        self.weight, self.total = self.weight + w.sum(), self.total + (w * x).sum()
        self.weight_squares = self.weight_squares + w.square().sum()
        self.cross = self.cross + (w.square() * x).sum()
        self.squares = self.squares + (w * x).square().sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean m = sum(w x) / sum(w), and sqrt(sum (w (x - m))^2) / sum(w)."""
        mean = self.total / self.weight
        # The squared deviations multiplied out, since the mean is known only now. Rounding may leave less than 0.
        deviations = (self.squares - 2 * mean * self.cross + mean.square() * self.weight_squares).clamp(min=0)
        error = deviations.sqrt() / self.weight
        return mean.float(), torch.where(self.count > 1, error, torch.nan).float()


class Throughput(Metric):
    """Prompts of all ranks, and their tokens per second of the slowest rank. `compute` returns both."""

    full_state_update = False
    prompts: Tensor
    tokens: Tensor
    seconds: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, reduction in (("prompts", "sum"), ("tokens", "sum"), ("seconds", "max")):
            self.add_state(name, torch.tensor(0.0, dtype=SUMS), dist_reduce_fx=reduction)

    def update(self, *, prompts: int, tokens: int, seconds: float) -> None:
        """Adds one batch of this rank, and the wall time of sampling it."""
        self.prompts, self.tokens = self.prompts + prompts, self.tokens + tokens
        self.seconds = self.seconds + seconds

    def compute(self) -> tuple[Tensor, Tensor]:
        """Prompts, and tokens per second."""
        return self.prompts, self.tokens / self.seconds


def rollout_means(scores: Scores, diagnostics: Mapping[str, Tensor]) -> dict[str, float]:
    """What is logged of a rollout buffer: means over the rollouts of all ranks, whose prompts may be of different
    tasks, and the number of rollouts that could not be scored. Every rank must call it.
    """
    values = {f"reward/{name}": value for name, value in scores.components.items()} | dict(diagnostics)
    # The spread is taken within groups, because weights compare rollouts of one prompt only.
    values |= {"reward/total": scores.total, "reward/spread": scores.total.std(-1)}
    return means_over_ranks(values) | {"reward/failures": float(sum(gather_ranks(scores.failures)))}


@dataclass(frozen=True)
class EvaluationResult:
    """What one sampler reached at one completion length."""

    sampler: str
    length: int
    prompts: int
    """Examples evaluated, over all ranks."""
    means: dict[str, tuple[float, float]]
    """Mean and standard error by name."""
    tokens_per_second: float


class EvaluationMetrics:
    """Everything that is averaged of one sampler at one completion length."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.means: dict[str, MeanWithError] = {}
        self.throughput = Throughput().to(device)

    def update(self, batch: "EvaluatedBatch") -> None:
        """Adds a batch."""
        for name, values in batch.values.averaged.items():
            self._mean(name).update(values, batch.values.weights.get(name))
        self.throughput.update(prompts=len(batch.examples), tokens=batch.tokens, seconds=batch.seconds)

    def result(self, sampler: str, length: int) -> EvaluationResult:
        """The means over all ranks. Every rank must call it.

        Names that a rank did not meet, because its prompts were of another task, are added to it first. Otherwise ranks
        would reduce different metrics, and wait for each other for ever.
        """
        names = dict.fromkeys(name for own in gather_ranks(list(self.means)) for name in own)
        for name in names:
            self._mean(name).update(torch.empty(0, 1, dtype=torch.float32))
        means = {name: self.means[name].compute() for name in names}
        prompts, rate = self.throughput.compute()
        pairs = {name: (float(mean), float(error)) for name, (mean, error) in means.items()}
        return EvaluationResult(sampler, length, int(prompts), pairs, float(rate))

    def _mean(self, name: str) -> MeanWithError:
        if name not in self.means:
            self.means[name] = MeanWithError().to(self.device)
        return self.means[name]
