"""What is averaged of a batch of completions: scores, measures and votes, of all prompts and of each task."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import comb

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.rewards.scores import Scores, named_by_task
from dmpo_lightning.tasks.base import Verdict

Measures = Mapping[str, Float[Tensor, "prompts completions"]]


@dataclass(frozen=True)
class BatchValues:
    """Values by name. NaN is a value that does not apply to a prompt."""

    correct: Bool[Tensor, "prompts completions"]
    """By the check, or without one, whether the accuracy is 1."""
    scores: dict[str, Float[Tensor, "prompts completions"]]
    """Reward, its components, accuracy."""
    measures: dict[str, Float[Tensor, "prompts completions"]]
    """Of each completion, whatever the reward."""
    votes: dict[str, Float[Tensor, "prompts 1"]]
    """pass@j and majority, of each prompt. A single completion has none."""
    weights: dict[str, Float[Tensor, " prompts"]]
    """Of prompts in the mean of a value, where they do not count alike."""

    @property
    def averaged(self) -> dict[str, Float[Tensor, "prompts _"]]:
        """Everything that has a mean."""
        return self.scores | self.measures | self.votes


def batch_values(scores: Scores, measures: Measures) -> BatchValues:
    """The values of a batch. A mixture has those of each task too, named ``task/value``."""
    values = scores.named
    if not scores.parts:
        correct = (values["accuracy"] if scores.verdicts is None else values["correct"]) == 1
        # A failed completion is wrong even where failures are worth 1.
        correct = correct if scores.failed is None else correct & ~scores.failed
        votes = _votes(correct, values["accuracy"], scores.verdicts)
        return BatchValues(correct, values, dict(measures), votes, _weights(scores))
    tasks = {
        task: batch_values(part, {name: value[scores.rows[task]] for name, value in measures.items()})
        for task, part in scores.parts.items()
    }
    correct = torch.zeros_like(scores.total, dtype=torch.bool)
    for task, each in tasks.items():
        correct[scores.rows[task]] = each.correct

    def named(tables: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        return named_by_task(tables, scores.rows, len(scores.total))

    return BatchValues(
        correct,
        scores=values,
        measures={**measures, **named({task: each.measures for task, each in tasks.items()})},
        votes=_votes(correct, values["accuracy"], scores.verdicts)
        | named({task: each.votes for task, each in tasks.items()}),
        weights=named({task: each.weights for task, each in tasks.items()}),
    )


def _weights(scores: Scores) -> dict[str, Float[Tensor, " prompts"]]:
    """Of the share, and of what is made of it: it is averaged over parts, not prompts, as published.

    A prompt counts by the number of its parts.
    """
    shares = [next((each.share for each in group if each.share), None) for group in scores.verdicts or ()]
    names = {share.name for share in shares if share}
    # Shares of different things have no mean.
    if len(names) != 1:
        return {}
    (name,) = names
    parts = torch.tensor([float(share.of) if share else 0.0 for share in shares], dtype=torch.float32)
    # Where the accuracy is the share, and the vote's accuracy with it, they have to be averaged as the share is.
    made_of_share = ("accuracy", "majority") if scores.accuracy == name else ()
    return dict.fromkeys((name, *made_of_share), parts)


def _votes(
    correct: Bool[Tensor, "prompts completions"],
    accuracy: Float[Tensor, "prompts completions"],
    verdicts: list[list[Verdict]] | None,
) -> dict[str, Float[Tensor, "prompts 1"]]:
    """What several completions of a prompt say together.

    These are pass@j for the powers of two up to the number of completions and for that number, and as ``majority`` the
    accuracy of the answer given most often, for which a check must have read the answers.
    """
    count, completions = correct.sum(-1), correct.shape[-1]
    if completions == 1:
        return {}
    # A set, because the number of completions may itself be a power of two.
    draws = sorted({completions, *(2**power for power in range(completions.bit_length()))})
    votes = {f"pass@{j}": pass_at(j, correct=count, completions=completions)[:, None] for j in draws}
    if verdicts is not None:
        winners = [majority([verdict.ballot for verdict in group]) for group in verdicts]
        elected = [0.0 if winner is None else float(row[winner]) for row, winner in zip(accuracy, winners, strict=True)]
        votes["majority"] = torch.tensor(elected, dtype=torch.float32)[:, None]
    return votes


def pass_at(draws: int, *, correct: Int[Tensor, " prompts"], completions: int) -> Float[Tensor, " prompts"]:
    """Chance that ``draws`` of a prompt's ``completions`` hold a correct one: 1 - C(n - c, j) / C(n, j).

    Unbiased for pass@j with j = ``draws`` at most n = ``completions`` (Chen et al. 2021, arXiv 2107.03374).
    """
    chances = [1 - comb(completions - c, draws) / comb(completions, draws) for c in correct.tolist()]
    return torch.tensor(chances, dtype=torch.float32)


def majority(ballots: Sequence[Hashable | None]) -> int | None:
    """The position of the first ballot for the most frequent answer, or None if nobody votes.

    None is no vote. Of answers that are equally frequent the one that came first wins.
    """
    counts = Counter(ballot for ballot in ballots if ballot is not None)
    return ballots.index(max(counts, key=counts.__getitem__)) if counts else None
