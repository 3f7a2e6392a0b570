"""Rollouts as records: plain values of what was sampled, token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dmpo_lightning.functional import Purpose, fold_in, uniforms
from dmpo_lightning.rollout import RolloutBuffer

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


@dataclass(frozen=True)
class TokenFacts:
    """Of some completions: what each token is, when it was revealed and how likely it was then."""

    tokens: list[list[str]]
    steps: list[list[int]]
    confidences: list[list[float]]

    def of(self, row: int) -> dict[str, Any]:
        """The part of a record that says so of one completion."""
        return {
            "tokens": self.tokens[row],
            "reveal_step": self.steps[row],
            "confidence": self.confidences[row],
        }


def token_facts(texts: TokenTexts, ids: Tensor, steps: Tensor, log_probs: Tensor) -> TokenFacts:
    """The facts of completions, each argument ``[rows length]``."""
    # Rounded in float64, whose shortest decimals the rounded numbers are.
    confidences = log_probs.double().exp().mul(10**DIGITS).round().div(10**DIGITS)
    return TokenFacts([[texts[token] for token in row] for row in ids.tolist()], steps.tolist(), confidences.tolist())


def is_drawn(keys: Tensor, share: float) -> Tensor:
    """Which rollouts are recorded: a draw of their own keys, so that it is the same however the run is cut up."""
    return uniforms(fold_in(keys, Purpose.RECORD), 1).squeeze(-1) < share


def rollout_records(buffer: RolloutBuffer, texts: TokenTexts, *, share: float) -> Iterator[dict[str, Any]]:
    """One record for each rollout of a buffer that is drawn, in the order of the prompts."""
    rollouts = buffer.rollouts
    chosen = is_drawn(rollouts.keys, share).nonzero().cpu()
    if not len(chosen):
        return
    rows, columns = chosen.unbind(-1)

    def of_chosen(values: Tensor) -> Tensor:
        return values.detach().cpu()[rows, columns]

    facts = token_facts(texts, *map(of_chosen, _facts_of(buffer)))
    shape = rollouts.group_shape
    named = {name: value for name, value in buffer.targets.items() if tuple(value.shape) == shape}
    targets = {name: _numbers(of_chosen(value)) for name, value in named.items()}
    components = {name: _numbers(of_chosen(value)) for name, value in rollouts.components.items()}
    rewards, keys = _numbers(of_chosen(rollouts.reward)), of_chosen(rollouts.keys).tolist()
    indices = buffer.rollouts.prompts.prompt_index.tolist()
    prompts = _prompts(buffer, texts, sorted(set(rows.tolist())))
    for place, (row, column) in enumerate(chosen.tolist()):
        scores = {name: values[place] for name, values in components.items() if values[place] is not None}
        # Readers find the first four without reading the rest (`reports.rollouts`).
        yield {
            "iteration": buffer.number,
            "prompt_index": indices[row],
            "rollout": column,
            "reward": rewards[place],
            "components": scores,
            **{name: values[place] for name, values in targets.items()},
            "key": keys[place],
            "prompt": prompts[row],
            "completion": buffer.rollouts.completions[row][column],
            **facts.of(place),
        }


def _facts_of(buffer: RolloutBuffer) -> Sequence[Tensor]:
    rollouts = buffer.rollouts
    return rollouts.completion_ids, rollouts.reveal_step, rollouts.sampled_log_prob


def _numbers(values: Tensor) -> list[float | None]:
    """Six digits, which float32 has, and None for a number that JSON does not have."""
    kept = values.double()
    scale = 10.0 ** (5 - kept.abs().clamp(min=1e-30).log10().floor())
    plain = (kept * scale).round() / scale
    return [value if finite else None for value, finite in zip(plain.tolist(), plain.isfinite().tolist(), strict=True)]


def _prompts(buffer: RolloutBuffer, texts: TokenTexts, rows: list[int]) -> dict[int, str]:
    """The prompts of these rows as the model read them, without special tokens."""
    batch = buffer.rollouts.prompts
    ids, masks = batch.prompt_ids.cpu()[rows], batch.prompt_mask.cpu()[rows]
    kept = [row[mask].tolist() for row, mask in zip(ids, masks, strict=True)]
    return dict(zip(rows, texts.tokenizer.batch_decode(kept, skip_special_tokens=True), strict=True))
