"""One batch of an evaluation: sampled, decoded, scored, checked."""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmpo_lightning.distributed.ranks import own_rank
from dmpo_lightning.evaluation.values import BatchValues, batch_values
from dmpo_lightning.policy import Policy
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rewards.scores import Scores
from dmpo_lightning.rollout import PromptBatch, Sampling, grouped, mapped, sample_completions
from dmpo_lightning.samplers import Samples
from dmpo_lightning.tasks.base import Verdict

EVALUATION = -1
"""The number of a buffer that keys evaluation draws: the same at every validation, so that curves share their noise."""
MEASURES = ("effective_length", "truncated")
"""What is measured of every completion beside its score: tokens before the first end token, and whether it has none."""


@dataclass(frozen=True)
class EvaluatedBatch:
    """What one sampler wrote for a batch of prompts, and what reward and check say of it. Filler is left out."""

    completion_length: int
    prompt_index: list[int]
    examples: list[Any]
    completions: list[list[str]]
    """As the check read them, with special tokens, or without them where the reward has no check."""
    verdicts: list[list[Verdict]] | None
    values: BatchValues
    samples: Samples
    """In one row each, on the CPU."""
    tokens: int
    seconds: float
    """Wall time of sampling."""

    def records(self, sampler: str) -> list[dict[str, Any]]:
        """One dictionary per completion, ready for JSON. Scores that do not apply are left out."""
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


def evaluate(policy: Policy, reward: Reward, prompts: PromptBatch, sampling: Sampling) -> EvaluatedBatch:
    """Samples completions of each prompt, scores the texts without special tokens and checks those with them.

    The check reads the special tokens because published checks search for the end of the turn. The first
    completions of a prompt are the same however many there are.
    """
    if own_rank()[1] == 1:
        # Filler keeps several ranks in step, and a single one has nobody to keep in step with.
        prompts = prompts[~prompts.is_filler]
    completions = sampling.group_size
    started = time.perf_counter()
    samples, _ = sample_completions(policy, prompts, replace(sampling, buffer=EVALUATION))
    # Waits for the device, so that the time is that of sampling.
    samples, prompts = mapped(samples, Tensor.cpu), prompts.to("cpu")
    seconds = time.perf_counter() - started
    real = prompts[~prompts.is_filler]
    kept = ~prompts.is_filler.repeat_interleave(completions)
    samples = mapped(samples, lambda each: each[kept])
    ids = samples.completion_ids
    texts = raw = grouped(policy.decode(ids), completions)
    if reward.check is not None:
        raw = grouped(policy.decode(ids, special_tokens=True), completions)
    # A rank that had filler alone has no completion by which components could be named.
    scores = Scores({}, torch.zeros(0, completions, dtype=torch.float32), failures=0)
    if real.examples:
        scores = reward(real.examples, texts, real.prompt_index.tolist(), raw=raw)
    lengths = policy.effective_length(ids).view(-1, completions)
    measures = {"effective_length": lengths.float(), "truncated": (lengths == ids.shape[-1]).float()}
    return EvaluatedBatch(
        completion_length=sampling.completion_length,
        prompt_index=real.prompt_index.tolist(),
        examples=real.examples,
        completions=raw,
        verdicts=scores.verdicts,
        values=batch_values(scores, measures),
        samples=samples,
        tokens=ids.numel(),
        seconds=seconds,
    )


def _json_answer(verdict: Verdict) -> str | float | None:
    """JSON has no number that is not finite."""
    answer = verdict.answer
    return str(answer) if isinstance(answer, float) and not math.isfinite(answer) else answer
