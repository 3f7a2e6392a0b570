"""What several completions of one prompt say together: pass@j and majority votes."""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb

import torch
from jaxtyping import Float, Int
from torch import Tensor


def pass_at(draws: int, *, correct: Int[Tensor, " prompts"], completions: int) -> Float[Tensor, " prompts"]:
    """Chance that ``draws`` of a prompt's ``completions`` hold a correct one: 1 - C(n - c, j) / C(n, j).

    Unbiased for pass@j with j = ``draws`` at most n = ``completions`` (Chen et al. 2021, arXiv 2107.03374).
    """
    chances = [1 - comb(completions - c, draws) / comb(completions, draws) for c in correct.tolist()]
    return torch.tensor(chances, dtype=torch.float32)


def majority(ballots: Sequence[Hashable | None]) -> int | None:
    """Place of the first ballot for the most frequent answer, or None if nobody votes.

    None is no vote. Of answers that are equally frequent the one that came first wins.
    """
    counts = Counter(ballot for ballot in ballots if ballot is not None)
    return ballots.index(max(counts, key=counts.__getitem__)) if counts else None
