"""What the ranks of a job say to each other. A single process answers for itself."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def own_rank() -> tuple[int, int]:
    """This process's rank and the number of processes. They are 0 and 1 where nothing is distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gather_ranks(state: Any) -> list[Any]:
    """The states of all ranks, in their order. Every rank must call it, and gets them all."""
    states: list[Any] = [state] * own_rank()[1]
    if len(states) == 1:
        return states
    torch.distributed.all_gather_object(states, state)
    return states


def check_same_start(start: str) -> None:
    """Raises RuntimeError on every rank where ranks start differently."""
    starts = gather_ranks(start)
    if len(set(starts)) > 1:
        said = ", ".join(f"rank {rank} {each}" for rank, each in enumerate(starts))
        raise RuntimeError(
            f"The ranks start differently ({said}): each found another checkpoint. Pass the path of one that all nodes "
            "see; `--ckpt_path last` has rank 0 choose."
        )


def log_mean_exp_over_ranks(values: Tensor) -> float:
    """The logarithm of the mean of ``exp(values)`` over the numbers of all ranks. Every rank must call it."""
    states = gather_ranks((float(values.double().logsumexp(-1)), values.numel()))
    sums, counts = zip(*states, strict=True)
    return float(torch.tensor(sums, dtype=torch.float64).logsumexp(-1)) - math.log(sum(counts))


def means_over_ranks(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over the numbers of all ranks, for each name that any of them has. Every rank must call it.

    NaN is a value that does not apply, and is left out. A name with nothing else is missing. Objects are gathered
    instead of one reduction per name, because a reduction that only some ranks know of would hang.
    """
    own = {name: (float(value.nansum()), int((~value.isnan()).sum())) for name, value in values.items()}
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for state in gather_ranks(own):
        for name, (total, count) in state.items():
            totals[name], counts[name] = totals.get(name, 0.0) + total, counts.get(name, 0) + count
    return {name: total / counts[name] for name, total in totals.items() if counts[name]}
