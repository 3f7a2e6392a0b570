"""What is averaged of a batch of completions: scores, measures, votes; of all prompts and of each task of a mixture."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dmpo_lightning.evaluation.votes import majority, pass_at
from dmpo_lightning.rewards.reward import Reward, Scores
from dmpo_lightning.tasks.base import Verdict

Verdicts = list[list[Verdict]]
"""Of each prompt's completions."""


@dataclass(frozen=True)
class BatchValues:
    """Values by name; NaN where one does not apply to a prompt."""

    correct: Bool[Tensor, "prompts completions"]
    """By the answer check; without one, whether the accuracy is 1."""
    scores: dict[str, Float[Tensor, "prompts completions"]]
    """Reward, its components, accuracy."""
    measures: dict[str, Float[Tensor, "prompts completions"]]
    """Of each completion, whatever the reward."""
    votes: dict[str, Float[Tensor, "prompts 1"]]
    """pass@j and majority, of each prompt; nothing for a single completion."""
    weights: dict[str, Float[Tensor, " prompts"]]
    """Of prompts in the mean of a value, where they do not count alike."""

    @property
    def averaged(self) -> dict[str, Float[Tensor, "prompts _"]]:
        """Everything that has a mean."""
        return self.scores | self.measures | self.votes


def batch_values(
    reward: Reward,
    examples: Sequence[Any],
    scores: Scores,
    verdicts: Verdicts | None,
    measures: dict[str, Float[Tensor, "prompts completions"]],
) -> BatchValues:
    """The values of a batch; in a mixture those of each task too, named ``task/value``."""
    parts = reward.parts(examples)
    if not parts:
        return _values(reward, scores, verdicts, measures)
    tasks: dict[str, BatchValues] = {}
    for task, (own, rows) in parts.items():
        components = {name: value[rows] for name, value in _of_task(task, scores.components).items()}
        checked = None if verdicts is None else [verdicts[row] for row in rows]
        of_rows = {name: value[rows] for name, value in measures.items()}
        tasks[task] = _values(own, Scores(components, scores.total[rows], 0), checked, of_rows)
    rows_of = {task: rows for task, (_, rows) in parts.items()}
    correct, accuracy = torch.zeros_like(scores.total), torch.zeros_like(scores.total)
    for task, rows in rows_of.items():
        correct[rows], accuracy[rows] = tasks[task].correct.to(correct), tasks[task].scores["accuracy"]
    overall = {"reward": scores.total, "accuracy": accuracy}
    votes = _votes(correct == 1, accuracy, verdicts)
    spread = {
        kind: _spread({task: getattr(each, kind) for task, each in tasks.items()}, rows_of, len(examples))
        for kind in ("scores", "measures", "votes", "weights")
    }
    return BatchValues(
        correct=correct == 1,
        scores=overall | spread["scores"],
        measures=measures | spread["measures"],
        votes=votes | spread["votes"],
        weights=spread["weights"],
    )


def _of_task(task: str, components: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The components of one task under its own names; reward and accuracy are worked out anew."""
    prefix = f"{task}/"
    names = (name.removeprefix(prefix) for name in components if name.startswith(prefix))
    return {name: components[prefix + name] for name in names if name not in ("reward", "accuracy")}


def _spread(
    tables: Mapping[str, Mapping[str, Tensor]], rows_of: Mapping[str, list[int]], prompts: int
) -> dict[str, Tensor]:
    """Each task's values in the rows of all prompts, NaN in those of other tasks."""
    spread: dict[str, Tensor] = {}
    for task, values in tables.items():
        for name, value in values.items():
            spread[f"{task}/{name}"] = value.new_full((prompts, *value.shape[1:]), math.nan)
            spread[f"{task}/{name}"][rows_of[task]] = value
    return spread


def _values(reward: Reward, scores: Scores, verdicts: Verdicts | None, measures: dict[str, Tensor]) -> BatchValues:
    values = _score_values(reward, scores, verdicts)
    accuracy = values["accuracy"]
    correct = accuracy == 1 if verdicts is None else _table(verdicts, lambda v: v.correct) == 1
    votes, weights = _votes(correct, accuracy, verdicts), _weights(reward, verdicts)
    return BatchValues(correct=correct, scores=values, measures=measures, votes=votes, weights=weights)


def _score_values(
    reward: Reward, scores: Scores, verdicts: Verdicts | None
) -> dict[str, Float[Tensor, "prompts completions"]]:
    """Reward, components and accuracy; what the answer check says takes the place of components of the same names."""
    values = {"reward": scores.total, **scores.components}
    if verdicts is not None:
        values["correct"] = _table(verdicts, lambda v: float(v.correct))
        if any(verdict.blank_cells is not None for group in verdicts for verdict in group):
            values["correct_cells"] = _table(verdicts, _share_of_cells)
    if "accuracy" not in values and reward.accuracy in values:
        values["accuracy"] = values[reward.accuracy]
    elif "accuracy" not in values and scores.components:
        raise ValueError(f"`accuracy` {reward.accuracy!r} is none of the reward's components: {sorted(values)}.")
    values.setdefault("accuracy", torch.zeros_like(scores.total))
    return values


def _share_of_cells(verdict: Verdict) -> float:
    if verdict.blank_cells is None:
        return math.nan
    return (verdict.correct_cells or 0) / verdict.blank_cells if verdict.blank_cells else float(verdict.correct)


def _weights(reward: Reward, verdicts: Verdicts | None) -> dict[str, Float[Tensor, " prompts"]]:
    """A share of cells is averaged over cells, not puzzles, as published: a puzzle counts by its blanks."""
    if verdicts is None or all(group[0].blank_cells is None for group in verdicts):
        return {}
    blanks = torch.tensor([float(group[0].blank_cells or 0) for group in verdicts], dtype=torch.float32)
    cells = ("correct_cells", "accuracy", "majority") if reward.accuracy == "correct_cells" else ("correct_cells",)
    return dict.fromkeys(cells, blanks)


def _votes(
    correct: Bool[Tensor, "prompts completions"],
    accuracy: Float[Tensor, "prompts completions"],
    verdicts: Verdicts | None,
) -> dict[str, Float[Tensor, "prompts 1"]]:
    """pass@j for the powers of two up to the number of completions, and for that; the accuracy of the answer given most
    often.
    """
    count, completions = correct.sum(-1), correct.shape[-1]
    if completions == 1:
        return {}
    draws = sorted({completions, *(2**power for power in range(completions.bit_length()))})
    votes = {f"pass@{j}": pass_at(j, correct=count, completions=completions)[:, None] for j in draws}
    if verdicts is not None:
        winners = [majority([verdict.ballot for verdict in group]) for group in verdicts]
        elected = [0.0 if winner is None else float(row[winner]) for row, winner in zip(accuracy, winners, strict=True)]
        votes["majority"] = torch.tensor(elected, dtype=torch.float32)[:, None]
    return votes


def _table(verdicts: Verdicts, value: Callable[[Verdict], float]) -> Float[Tensor, "prompts completions"]:
    return torch.tensor([[float(value(verdict)) for verdict in group] for group in verdicts], dtype=torch.float32)
