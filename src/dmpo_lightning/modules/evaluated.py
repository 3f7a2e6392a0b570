"""One batch of an evaluation: sampled, decoded, scored, checked."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.modules.metrics import majority, pass_at
from dmpo_lightning.policy import Policy
from dmpo_lightning.rewards import Reward, Scores
from dmpo_lightning.rollout import PromptBatch, grouped, sample_completions, score_completions
from dmpo_lightning.samplers import Sampler
from dmpo_lightning.tasks.base import Verdict

EVALUATION = -1
"""The iteration that keys evaluation draws: the same at every validation, so that curves share their noise."""
MEASURES = ("effective_length", "truncated")
"""What is measured of every completion beside its score: tokens before the first end token; no end token at all."""


@dataclass(frozen=True)
class EvaluatedBatch:
    """What one sampler wrote for a batch of prompts, filler left out, and what reward and answer check say of it."""

    completion_length: int
    prompt_index: list[int]
    examples: list[Any]
    completions: list[list[str]]
    """As the answer check read them, with special tokens; without them where the reward has no answer check."""
    verdicts: list[list[Verdict]] | None
    correct: Bool[Tensor, "prompts completions"]
    """By the answer check; without one, whether the accuracy is 1."""
    scores: dict[str, Float[Tensor, "prompts completions"]]
    """Reward, its components, accuracy."""
    measures: dict[str, Float[Tensor, "prompts completions"]]
    """Of each completion, see `MEASURES`."""
    votes: dict[str, Float[Tensor, "prompts 1"]]
    """pass@j and majority, of each prompt; nothing for a single completion."""
    weights: dict[str, Float[Tensor, " prompts"]]
    """Of prompts in the mean of a value, where they do not count alike."""
    tokens: int
    seconds: float
    """Wall time of sampling."""

    @property
    def values(self) -> dict[str, Float[Tensor, "prompts _"]]:
        """All that is averaged."""
        return self.scores | self.measures | self.votes

    def records(self, sampler: str) -> list[dict[str, Any]]:
        """One dictionary per completion, ready for JSON; scores that do not apply are left out."""
        return [
            {
                "index": index,
                "sampler": sampler,
                "length": self.completion_length,
                "rollout": rollout,
                "example": self.examples[row],
                "completion": text,
                "answer": None if self.verdicts is None else _json_answer(self.verdicts[row][rollout]),
                "correct": bool(self.correct[row, rollout]),
                "scores": {
                    name: float(score[row, rollout])
                    for name, score in self.scores.items()
                    if not score[row, rollout].isnan()
                },
                "effective_length": int(self.measures["effective_length"][row, rollout]),
            }
            for row, index in enumerate(self.prompt_index)
            for rollout, text in enumerate(self.completions[row])
        ]


def evaluate(
    policy: Policy,
    sampler: Sampler,
    reward: Reward,
    prompts: PromptBatch,
    *,
    completions: int,
    completion_length: int,
    seed: int,
    rows_per_forward: int | None = None,
) -> EvaluatedBatch:
    """``completions`` of each prompt, scored without special tokens and checked with them.

    The first completions of a prompt are the same however many there are.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        prompts = prompts.without_filler()  # which is for keeping several ranks in step
    started = time.perf_counter()
    samples, _ = sample_completions(
        policy,
        sampler,
        prompts,
        group_size=completions,
        completion_length=completion_length,
        seed=seed,
        iteration=EVALUATION,
        rows_per_forward=rows_per_forward,
    )
    ids = samples.completion_ids.cpu()  # waits for the device, so that the time is that of sampling
    seconds = time.perf_counter() - started
    real = prompts.to("cpu").without_filler()
    ids = ids[~prompts.is_filler.cpu().repeat_interleave(completions)]
    scores, texts, verdicts = _scored(policy, reward, real, ids, completions)
    values = _score_values(reward, scores, verdicts)
    correct = values["accuracy"] == 1 if verdicts is None else _table(verdicts, lambda v: v.correct) == 1
    return EvaluatedBatch(
        completion_length=completion_length,
        prompt_index=real.prompt_index.tolist(),
        examples=real.examples,
        completions=texts,
        verdicts=verdicts,
        correct=correct,
        scores=values,
        measures=_measures(policy, ids, completions),
        votes=_votes(correct, values["accuracy"], verdicts) if completions > 1 else {},
        weights=_weights(reward, verdicts),
        tokens=ids.numel(),
        seconds=seconds,
    )


def _scored(
    policy: Policy, reward: Reward, prompts: PromptBatch, ids: Int[Tensor, "rows length"], completions: int
) -> tuple[Scores, list[list[str]], list[list[Verdict]] | None]:
    """Scores of the texts without special tokens; the texts that the answer check read, and its verdicts."""
    if not prompts.examples:  # a rank that had filler alone
        return Scores({}, torch.zeros(0, completions), 0), [], None
    scores, texts = score_completions(policy, reward, prompts, ids, completions)
    verify = reward.verify
    if verify is None:
        return scores, grouped(texts, completions), None
    raw = grouped(policy.decode(ids, special_tokens=True), completions)
    verdicts = [[verify(example, text) for text in group] for example, group in zip(prompts.examples, raw, strict=True)]
    return scores, raw, verdicts


def _score_values(
    reward: Reward, scores: Scores, verdicts: list[list[Verdict]] | None
) -> dict[str, Float[Tensor, "prompts completions"]]:
    """Reward, components and accuracy; what the answer check says takes the place of components of the same names."""
    values = {"reward": scores.total, **scores.components}
    if verdicts is not None:
        values["correct"] = _table(verdicts, lambda v: float(v.correct))
        if any(verdict.blank_cells is not None for group in verdicts for verdict in group):
            values["correct_cells"] = _table(verdicts, _share_of_cells)
    values.setdefault("accuracy", values.get(reward.accuracy, torch.zeros_like(scores.total)))
    return values


def _share_of_cells(verdict: Verdict) -> float:
    if verdict.blank_cells is None:
        return math.nan
    return (verdict.correct_cells or 0) / verdict.blank_cells if verdict.blank_cells else float(verdict.correct)


def _weights(reward: Reward, verdicts: list[list[Verdict]] | None) -> dict[str, Float[Tensor, " prompts"]]:
    """A share of cells is averaged over cells, not puzzles, as published: a puzzle counts by its blanks."""
    if verdicts is None or all(group[0].blank_cells is None for group in verdicts):
        return {}
    blanks = torch.tensor([float(group[0].blank_cells or 0) for group in verdicts])
    cells = ("correct_cells", "accuracy", "majority") if reward.accuracy == "correct_cells" else ("correct_cells",)
    return dict.fromkeys(cells, blanks)


def _measures(
    policy: Policy, ids: Int[Tensor, "rows length"], completions: int
) -> dict[str, Float[Tensor, "prompts completions"]]:
    lengths = policy.effective_length(ids).view(-1, completions)
    return {"effective_length": lengths.float(), "truncated": (lengths == ids.shape[-1]).float()}


def _votes(
    correct: Bool[Tensor, "prompts completions"],
    accuracy: Float[Tensor, "prompts completions"],
    verdicts: list[list[Verdict]] | None,
) -> dict[str, Float[Tensor, "prompts 1"]]:
    """pass@j for the powers of two up to the number of completions; the accuracy of the answer given most often."""
    count, completions = correct.sum(-1), correct.shape[-1]
    draws = [2**power for power in range(completions.bit_length())]
    votes = {f"pass@{j}": pass_at(j, correct=count, completions=completions)[:, None] for j in draws}
    if verdicts is not None:
        winners = [majority([verdict.ballot for verdict in group]) for group in verdicts]
        elected = [0.0 if winner is None else float(row[winner]) for row, winner in zip(accuracy, winners, strict=True)]
        votes["majority"] = torch.tensor(elected)[:, None]
    return votes


def _table(verdicts: list[list[Verdict]], value: Callable[[Verdict], float]) -> Float[Tensor, "prompts completions"]:
    return torch.tensor([[float(value(verdict)) for verdict in group] for group in verdicts])


def _json_answer(verdict: Verdict) -> str | float | None:
    answer = verdict.answer
    return str(answer) if isinstance(answer, float) and not math.isfinite(answer) else answer
