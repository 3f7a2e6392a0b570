"""Completions as records: plain values of what was sampled, token by token."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dmpo_lightning.data.mixture import MixtureDataModule
from dmpo_lightning.evaluation.batch import EvaluatedBatch
from dmpo_lightning.rollout import PromptBatch, RolloutBuffer
from dmpo_lightning.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def task_of(datamodule: Any, example: Any) -> Task | None:
    """The task that an example is of, if it is of one."""
    if isinstance(datamodule, MixtureDataModule):
        datamodule = datamodule.datamodules[example["task"]]
    task = getattr(datamodule, "task", None)
    return task if isinstance(task, Task) else None


def rollout_records(
    buffer: RolloutBuffer, tokenizer: "PreTrainedTokenizerBase", datamodule: Any = None
) -> Iterator[dict[str, Any]]:
    """One record for each rollout of a buffer, in the order of the prompts."""
    rollouts = buffer.rollouts
    shape = rollouts.reward.shape
    tokens = (rollouts.completion_ids, rollouts.reveal_step, rollouts.sampled_log_prob)
    facts = token_facts(tokenizer, *(each.flatten(0, 1) for each in tokens))
    targets = {name: value.tolist() for name, value in buffer.targets.items() if value.shape == shape}
    components = {name: value.tolist() for name, value in rollouts.components.items()}
    rewards, keys, indices = rollouts.reward.tolist(), rollouts.keys.tolist(), rollouts.prompts.prompt_index.tolist()
    for row, prompt in enumerate(prompt_texts(tokenizer, rollouts.prompts)):
        example = rollouts.prompts.examples[row]
        task = task_of(datamodule, example)
        difficulty = None if task is None else task.difficulty(example)
        for column, completion in enumerate(rollouts.completions[row]):
            scores = {name: rounded(values[row][column]) for name, values in components.items()}
            yield {
                "buffer": buffer.number,
                "prompt_index": indices[row],
                "rollout": column,
                "reward": rounded(rewards[row][column]),
                "components": {name: score for name, score in scores.items() if score is not None},
                **{name: rounded(values[row][column]) for name, values in targets.items()},
                "key": keys[row][column],
                **({} if difficulty is None else {"difficulty": difficulty}),
                "prompt": prompt,
                "completion": completion,
                **drawings(task, example, completion),
                **facts[row * shape[1] + column],
            }


def example_records(
    evaluated: EvaluatedBatch, batch: PromptBatch, tokenizer: "PreTrainedTokenizerBase", moment: str, datamodule: Any
) -> Iterator[dict[str, Any]]:
    """One record for the first completion of each example of a batch, which is that of the evaluation."""
    prompts, samples = prompt_texts(tokenizer, batch[~batch.is_filler]), evaluated.samples
    several = len(evaluated.completions[0]) if evaluated.completions else 1
    tokens = (samples.completion_ids, samples.reveal_step, samples.log_prob)
    facts = token_facts(tokenizer, *(each[::several] for each in tokens))
    rewards, correct = evaluated.values.scores["reward"][:, 0].tolist(), evaluated.values.correct[:, 0].tolist()
    for row, (index, example) in enumerate(zip(evaluated.prompt_index, evaluated.examples, strict=True)):
        completion = evaluated.completions[row][0]
        yield {
            "moment": moment,
            "prompt_index": index,
            "reward": rounded(rewards[row]),
            "correct": correct[row],
            "prompt": prompts[row],
            "completion": completion,
            **drawings(task_of(datamodule, example), example, completion),
            **facts[row],
        }


def drawings(task: Task | None, example: Any, completion: str) -> dict[str, list[str]]:
    """The task's own pictures of an example and of its answer, if it draws any."""
    try:
        found = [] if task is None else [task.show(example, each) or "" for each in (None, completion)]
    # Completions are anything, and a run is worth more than a picture that somebody's task cannot make of one.
    except Exception:
        found = []
    return {"drawings": found} if any(found) else {}


def token_facts(
    tokenizer: "PreTrainedTokenizerBase", ids: Tensor, steps: Tensor, log_probs: Tensor
) -> list[dict[str, Any]]:
    """What each token of some completions is, when it was revealed and how likely it was then.

    Each tensor is ``[rows length]``.
    """
    # Each token is decoded once.
    different, positions = ids.unique(return_inverse=True)
    texts = tokenizer.batch_decode(different.unsqueeze(-1))
    # Three digits are shown. Rounded in float64, whose shortest decimals the rounded numbers are.
    confidences = log_probs.double().exp().mul(1000).round().div(1000)
    return [
        {"tokens": [str(texts[position]) for position in row], "reveal_step": revealed, "confidence": confidence}
        for row, revealed, confidence in zip(positions.tolist(), steps.tolist(), confidences.tolist(), strict=True)
    ]


def prompt_texts(tokenizer: "PreTrainedTokenizerBase", prompts: PromptBatch) -> list[str]:
    """The prompts as the model read them, without special tokens."""
    batch = prompts.to("cpu")
    kept = [row[mask].tolist() for row, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    return [str(text) for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]


def rounded(value: float) -> float | None:
    """Six digits, which float32 has, and None for a number that JSON does not have."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
