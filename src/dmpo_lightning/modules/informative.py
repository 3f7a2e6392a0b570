"""Buffers of prompts that say something: sampled in rounds until enough prompts have rollouts of different reward.

The idea is dynamic sampling of DAPO (arXiv 2503.14476). Here its cost is bounded, and whole groups are kept or left
out, so that within a prompt nothing is selected.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmpo_lightning.functional import equal_reward_groups
from dmpo_lightning.rewards.scores import Scores
from dmpo_lightning.rollout import PromptBatch, Rollouts


@dataclass(frozen=True)
class Round:
    """Rollouts of some prompts, with all that belongs to them. All fields are group by group."""

    prompts: PromptBatch
    rollouts: Rollouts
    scores: Scores
    completions: list[list[str]]

    @property
    def informative(self) -> Tensor:
        """Which groups have different rewards, ``[batch]``."""
        return ~equal_reward_groups(self.rollouts.reward)

    def __getitem__(self, index: Tensor) -> "Round":
        """Some of the groups, in the order of ``index``."""
        chosen = index.tolist()
        return Round(
            replace(self.prompts, examples=[self.prompts.examples[i] for i in chosen], **_picked(self.prompts, index)),
            replace(
                self.rollouts,
                components={name: value[index] for name, value in self.rollouts.components.items()},
                **_picked(self.rollouts, index),
            ),
            replace(
                self.scores,
                total=self.scores.total[index.to(self.scores.total.device)],
                components={name: value[index.to(value.device)] for name, value in self.scores.components.items()},
                parts={},
            ),
            [self.completions[i] for i in chosen],
        )


def collect_informative(
    collect: Callable[[PromptBatch], Round],
    candidates: PromptBatch,
    *,
    rounds: int,
    anywhere: Callable[[bool], bool],
) -> tuple[Round, Round]:
    """Samples candidates round by round until a buffer is full of informative groups, or no candidates are left.

    Args:
        collect: samples and scores the prompts of a round.
        candidates: the prompts, ``rounds`` times as many as the buffer holds.
        rounds: how many there are at most.
        anywhere: whether a flag is true on any rank. Ranks that share weights sample equally many rounds.

    Returns:
        The groups of the buffer, informative ones first and each kind in the order of the candidates, and all groups
        that were sampled.
    """
    size = len(candidates) // rounds
    sampled: list[Round] = []
    for prompts in _rounds(candidates, size):
        # Not asked before the first round, so that ranks say nothing to each other where there is only one.
        if sampled and not anywhere(size > sum(int(each.informative.sum()) for each in sampled)):
            break
        sampled.append(collect(prompts))
    whole = sampled[0] if len(sampled) == 1 else _joined(sampled)
    # A stable sort, so that each kind stays in the order of the candidates.
    order = (~whole.informative).to(torch.int8).argsort(stable=True)[:size]
    return (whole if len(sampled) == 1 else whole[order]), whole


def _rounds(candidates: PromptBatch, size: int) -> Iterator[PromptBatch]:
    for start in range(0, len(candidates), size):
        rows = slice(start, start + size)
        yield replace(candidates, examples=candidates.examples[rows], **_picked(candidates, rows))


def _joined(rounds: Sequence[Round]) -> Round:
    first = rounds[0]
    return Round(
        replace(
            first.prompts,
            examples=[example for each in rounds for example in each.prompts.examples],
            **_concatenated([each.prompts for each in rounds]),
        ),
        replace(
            first.rollouts,
            components=_union([each.rollouts.components for each in rounds]),
            **_concatenated([each.rollouts for each in rounds]),
        ),
        replace(
            first.scores,
            total=torch.cat([each.scores.total for each in rounds]),
            components=_union([each.scores.components for each in rounds]),
            failures=sum(each.scores.failures for each in rounds),
            parts={},
        ),
        [texts for each in rounds for texts in each.completions],
    )


def _picked(value: Any, index: Tensor | slice) -> Any:
    """The tensors of a dataclass, all of which have the batch axis first."""
    return {name: each[index] for name, each in vars(value).items() if isinstance(each, Tensor)}


def _concatenated(values: Sequence[Any]) -> Any:
    names = [name for name, each in vars(values[0]).items() if isinstance(each, Tensor)]
    return {name: torch.cat([getattr(value, name) for value in values]) for name in names}


def _union(tables: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Component by component. A round without prompts of a task does not have that task's."""
    names = dict.fromkeys(name for table in tables for name in table)
    like = [next(iter(table.values())) for table in tables] if names else []
    absent = [torch.full_like(each, math.nan) for each in like]
    return {
        name: torch.cat([table.get(name, nan) for table, nan in zip(tables, absent, strict=True)]) for name in names
    }
