"""Completions as records: plain values of what was sampled, token by token."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dmpo_lightning.evaluation.batch import EvaluatedBatch
from dmpo_lightning.functional import Purpose, fold_in, uniforms
from dmpo_lightning.rollout import PromptBatch, RolloutBuffer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = 3
"""Of confidences, which are shown and not computed with."""


class TokenTexts(dict[int, str]):
    """The text of each token by its id, decoded once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        self[token] = str(self.tokenizer.decode([token]))
        return self[token]

    def facts(self, ids: Tensor, steps: Tensor, log_probs: Tensor) -> list[dict[str, Any]]:
        """What each token of some completions is, when it was revealed and how likely it was then.

        Each argument is ``[rows length]``.
        """
        # Rounded in float64, whose shortest decimals the rounded numbers are.
        confidences = log_probs.double().exp().mul(10**DIGITS).round().div(10**DIGITS)
        columns = zip(ids.tolist(), steps.tolist(), confidences.tolist(), strict=True)
        return [
            {"tokens": [self[token] for token in row], "reveal_step": revealed, "confidence": confidence}
            for row, revealed, confidence in columns
        ]


def prompt_texts(tokenizer: "PreTrainedTokenizerBase", prompts: PromptBatch) -> list[str]:
    """The prompts as the model read them, without special tokens."""
    batch = prompts.to("cpu")
    kept = [row[mask].tolist() for row, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    return [str(text) for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]


def is_drawn(keys: Tensor, share: float) -> Tensor:
    """Which rollouts are recorded: a draw of their own keys, so that it is the same however the run is cut up."""
    return uniforms(fold_in(keys, Purpose.RECORD), 1).squeeze(-1) < share


def rollout_records(buffer: RolloutBuffer, texts: TokenTexts, *, share: float) -> Iterator[dict[str, Any]]:
    """One record for each rollout of a buffer that is drawn, in the order of the prompts."""
    rollouts = buffer.rollouts
    drawn = is_drawn(rollouts.keys, share)
    facts = texts.facts(rollouts.completion_ids[drawn], rollouts.reveal_step[drawn], rollouts.sampled_log_prob[drawn])
    targets = {name: value[drawn].tolist() for name, value in buffer.targets.items() if value.shape == drawn.shape}
    components = {name: value[drawn].tolist() for name, value in rollouts.components.items()}
    rewards, keys = rollouts.reward[drawn].tolist(), rollouts.keys[drawn].tolist()
    prompts, indices = prompt_texts(texts.tokenizer, rollouts.prompts), rollouts.prompts.prompt_index.tolist()
    for position, (row, column) in enumerate(drawn.nonzero().tolist()):
        yield {
            "buffer": buffer.number,
            "prompt_index": indices[row],
            "rollout": column,
            "reward": rounded(rewards[position]),
            "components": _known({name: values[position] for name, values in components.items()}),
            **{name: rounded(values[position]) for name, values in targets.items()},
            "key": keys[position],
            "prompt": prompts[row],
            "completion": rollouts.completions[row][column],
            **facts[position],
        }


def example_records(
    evaluated: EvaluatedBatch, batch: PromptBatch, texts: TokenTexts, moment: str
) -> list[dict[str, Any]]:
    """One record for the first completion of each example of a batch, which is that of the evaluation."""
    prompts, samples = prompt_texts(texts.tokenizer, batch[~batch.is_filler]), evaluated.samples
    several = len(evaluated.completions[0]) if evaluated.completions else 1
    facts = texts.facts(samples.completion_ids[::several], samples.reveal_step[::several], samples.log_prob[::several])
    scores = {name: value[:, 0].tolist() for name, value in evaluated.values.scores.items()}
    rewards = scores.pop("reward")
    return [
        {
            "moment": moment,
            "prompt_index": index,
            "reward": rounded(rewards[row]),
            "correct": bool(evaluated.values.correct[row, 0]),
            "components": _known({name: values[row] for name, values in scores.items()}),
            "prompt": prompts[row],
            "completion": evaluated.completions[row][0],
            **facts[row],
        }
        for row, index in enumerate(evaluated.prompt_index)
    ]


def rounded(value: float) -> float | None:
    """Six digits, which float32 has, and None for a number that JSON does not have."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _known(values: Mapping[str, float]) -> dict[str, float]:
    return {name: found for name, value in values.items() if (found := rounded(value)) is not None}
