"""One batch of an evaluation: sampled, decoded, scored, checked."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dmpo_lightning.evaluation.values import BatchValues, batch_values
from dmpo_lightning.policy import Policy
from dmpo_lightning.rewards.reward import Reward, Scores
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
    values: BatchValues
    tokens: int
    seconds: float
    """Wall time of sampling."""

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
                "correct": bool(self.values.correct[row, rollout]),
                "scores": {
                    name: float(score[row, rollout])
                    for name, score in self.values.scores.items()
                    if not score[row, rollout].isnan()
                },
                "effective_length": int(self.values.measures["effective_length"][row, rollout]),
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
    return EvaluatedBatch(
        completion_length=completion_length,
        prompt_index=real.prompt_index.tolist(),
        examples=real.examples,
        completions=texts,
        verdicts=verdicts,
        values=batch_values(reward, real.examples, scores, verdicts, _measures(policy, ids, completions)),
        tokens=ids.numel(),
        seconds=seconds,
    )


def _scored(
    policy: Policy, reward: Reward, prompts: PromptBatch, ids: Int[Tensor, "rows length"], completions: int
) -> tuple[Scores, list[list[str]], list[list[Verdict]] | None]:
    """Scores of the texts without special tokens; the texts that the answer check read, and its verdicts."""
    if not prompts.examples:  # a rank that had filler alone
        return Scores({}, torch.zeros(0, completions, dtype=torch.float32), 0), [], None
    scores, texts = score_completions(policy, reward, prompts, ids, completions)
    if reward.verify is None:
        return scores, grouped(texts, completions), None
    raw = grouped(policy.decode(ids, special_tokens=True), completions)
    rows = zip(prompts.examples, raw, prompts.prompt_index.tolist(), strict=True)
    verdicts = [[reward.check(example, text, number) for text in group] for example, group, number in rows]
    return scores, raw, verdicts


def _measures(
    policy: Policy, ids: Int[Tensor, "rows length"], completions: int
) -> dict[str, Float[Tensor, "prompts completions"]]:
    lengths = policy.effective_length(ids).view(-1, completions)
    return {"effective_length": lengths.float(), "truncated": (lengths == ids.shape[-1]).float()}


def _json_answer(verdict: Verdict) -> str | float | None:
    answer = verdict.answer
    return str(answer) if isinstance(answer, float) and not math.isfinite(answer) else answer
