"""What an evaluation counts, over batches and ranks: means with standard errors, throughput."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dmpo_lightning.distributed.ranks import gather_ranks
from dmpo_lightning.evaluation.batch import EvaluatedBatch


@dataclass(frozen=True)
class EvaluationResult:
    """What one sampler reached at one completion length."""

    sampler: str
    length: int
    prompts: int
    """The number of examples that were evaluated, over all ranks."""
    means: dict[str, tuple[float, float]]
    """The mean and its standard error, by name."""
    tokens_per_second: float
    """The tokens of all ranks per second of the slowest one."""


class EvaluationMetrics:
    """Everything that is averaged of one sampler at one completion length."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._prompts, self._tokens, self._seconds = 0, 0, 0.0

    def update(self, batch: EvaluatedBatch) -> None:
        """Adds a batch."""
        for name, values in batch.values.averaged.items():
            # Prompts are the independent unit: the completions of one are averaged first.
            means = values.double().nanmean(-1)
            weights = batch.values.weights.get(name, torch.ones_like(means)).double()
            self._values.setdefault(name, []).append(torch.stack([means, weights], dim=-1))
        self._prompts, self._tokens = self._prompts + len(batch.examples), self._tokens + batch.tokens
        self._seconds += batch.seconds

    def result(self, sampler: str, length: int) -> EvaluationResult:
        """The means over all ranks. Every rank must call it.

        Ranks may know different names, because their prompts were of different tasks.
        """
        # Numbers of single prompts are few enough to be gathered, and the mean must be known for the error.
        own = {name: torch.cat(parts) for name, parts in self._values.items()}
        tables, prompts, tokens, seconds = zip(
            *gather_ranks((own, self._prompts, self._tokens, self._seconds)), strict=True
        )
        names = dict.fromkeys(name for table in tables for name in table)
        rows = {name: torch.cat([table[name] for table in tables if name in table]) for name in names}
        means = {name: mean_with_error(*values.unbind(-1)) for name, values in rows.items()}
        return EvaluationResult(sampler, length, sum(prompts), means, sum(tokens) / max(*seconds, 1e-9))


def mean_with_error(values: Float[Tensor, " prompts"], weights: Float[Tensor, " prompts"]) -> tuple[float, float]:
    """The mean over prompts m = sum(w x) / sum(w), and its standard error sqrt(sum (w (x - m))^2) / sum(w).

    They are those of a ratio of sums, such as right parts over all parts. With equal weights they are the usual ones,
    clustered by prompt (Miller 2024, arXiv 2411.00640). NaN is a value that does not apply and is left out. The mean is
    NaN if there are no values, and the error if there is at most one.
    """
    applies = ~values.isnan()
    x, w = values[applies].double(), weights[applies].double()
    mean = (w * x).sum() / w.sum()
    error = (w * (x - mean)).square().sum().sqrt() / w.sum()
    # In float32, which is how sure these numbers are, and which logs show.
    return float(mean.float()), float(error.float()) if len(x) > 1 else float("nan")
