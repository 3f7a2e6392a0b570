"""Answers to prompts of one's own, with how each came about."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmpo_lightning.data.prompts import pad_left
from dmpo_lightning.data.tokens import named, tokenize_prompt, warn_of_lost_text
from dmpo_lightning.evaluation.batch import EVALUATION
from dmpo_lightning.functional.randomness import check_seed
from dmpo_lightning.policy import Policy
from dmpo_lightning.reports.page import viewer, viewer_item
from dmpo_lightning.reports.record import Completion
from dmpo_lightning.rollout import PromptBatch, Sampling, check_counts, sample_completions
from dmpo_lightning.samplers import Change, observed
from dmpo_lightning.tasks.base import Message
from dmpo_lightning.terminal import shortened

Prompt = str | Sequence[Message]


@dataclass(frozen=True, repr=False)
class Generation:
    """One answer to a prompt, and of each of its tokens when and how surely it was revealed.

    A notebook shows it in the viewer of reports, step by step.

    Example:
        >>> from dmpo_lightning import MaskedSFT
        >>> MaskedSFT("sudoku_tiny").generate("1234341221434320", completion_length=20)
        [Generation(prompt='1234341221434320', text='<answer>1234341221434321</answer>')]
    """

    prompt: Prompt
    index: int
    """The number of the prompt, which keys the draws as its position in a dataset does in a validation."""
    rollout: int
    """The number of this answer among those to the same prompt."""
    text: str
    """Up to the first end token, without special tokens."""
    ids: list[int]
    """All tokens of the completion, with those from the end token on."""
    steps: list[int | None]
    """The denoising step that revealed each token, from 0. None where an early exit filled it in."""
    confidence: list[float | None]
    """The `Confidence` of each token in that step. None where an early exit filled it in, and for samplers that keep no
    `Canvas`.
    """
    tokens: list[str]
    """The text of each token."""

    def __repr__(self) -> str:
        return f"Generation(prompt='{shortened(_as_text(self.prompt), 200)}', text='{shortened(self.text, 400)}')"

    def _repr_html_(self) -> str:
        """For notebooks: the viewer, whose script runs in a frame of its own and reaches nothing outside."""
        completion = Completion(
            _as_text(self.prompt),
            self.text,
            self.index,
            f"answer {self.rollout + 1}",
            verdict="not scored",
            tokens=tuple(
                (token, -1 if step is None else step, sure or 0.0)
                for token, step, sure in zip(self.tokens, self.steps, self.confidence, strict=True)
            ),
        )
        document = html.escape(viewer([viewer_item("answer", [completion])]))
        look = "width: 100%; height: 34em; border: 0"
        return f'<iframe srcdoc="{document}" sandbox="allow-scripts" style="{look}"></iframe>'


def _as_text(prompt: Prompt) -> str:
    """A prompt as people read it, of a conversation a paragraph per turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def generate(
    policy: Policy,
    prompts: Prompt | Sequence[Prompt],
    sampling: Sampling,
    *,
    prefill: str = "",
    index: Sequence[int] | None = None,
    on_change: Callable[[Change], None] | None = None,
) -> list[Generation]:
    """Samples answers to prompts, in eval mode and without gradient.

    An answer is the one that a validation with the same seed samples for a prompt at that position of its dataset. It
    depends on nothing else: neither on the other prompts nor on how many rows are sampled at a time. No generator of
    Python or torch is used.

    Args:
        policy: of the answers.
        prompts: texts, each a user's turn, or conversations. A single one need not stand in a list.
        sampling: how the answers are sampled. Its ``group_size`` is that of the answers to each prompt, and its
            ``buffer`` is that of a validation.
        prefill: what the assistant's turn starts with. It is part of the prompt, not of the answer.
        index: the numbers of the prompts, which key their draws. None counts them from 0.
        on_change: is shown each step, see `observed`. Rows are counted in the order of the answers.

    Returns:
        The answers, prompt by prompt.

    Raises:
        ValueError: no prompt at all, one that is none or too long, or a length that the sampler cannot unmask.
    """
    asked: list[Prompt] = _listed(prompts)
    length, completions = sampling.completion_length, sampling.group_size
    check_counts(completion_length=length, completions=completions, rows_per_forward=sampling.rows_per_forward)
    check_seed(sampling.seed)
    sampling.sampler.validate(length)
    sampling.sampler.validate_policy(policy)
    batch = _batch(policy, asked, index, prefill, length)
    confidence = torch.full((len(asked) * completions, length), torch.nan, device=batch.prompt_ids.device)

    def note(change: Change) -> None:
        confidence[change.rows] = torch.where(change.written, change.confidence, confidence[change.rows])
        if on_change is not None:
            on_change(change)

    with observed(note):
        samples, _ = sample_completions(policy, batch, replace(sampling, buffer=EVALUATION))
    rows = zip(
        policy.decode(samples.completion_ids),
        samples.completion_ids.tolist(),
        samples.reveal_step.tolist(),
        confidence.tolist(),
        strict=True,
    )
    numbers = batch.prompt_index.tolist()
    return [
        Generation(
            asked[row // completions],
            index=numbers[row // completions],
            rollout=row % completions,
            text=text,
            ids=ids,
            steps=[None if step < 0 else step for step in steps],
            confidence=[None if math.isnan(sure) else sure for sure in surely],
            tokens=[str(text) for text in policy.tokenizer.batch_decode([[token] for token in ids])],
        )
        for row, (text, ids, steps, surely) in enumerate(rows)
    ]


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Mapping)):
        return [prompts]  # type: ignore[list-item]
    if not len(prompts):
        raise ValueError("`prompts` must hold at least one prompt, got none.")
    return list(prompts)  # type: ignore[arg-type]


def _batch(
    policy: Policy, prompts: Sequence[Prompt], index: Sequence[int] | None, prefill: str, completion_length: int
) -> PromptBatch:
    """The prompts as a loader would hand them out."""
    numbers = list(range(len(prompts))) if index is None else list(index)
    if len(numbers) != len(prompts):
        raise ValueError(f"`index` must hold a number for each prompt, got {len(numbers)} for {len(prompts)}.")
    rows, room = [], policy.room_for_prompts(completion_length)
    for number, prompt in enumerate(prompts, 1):
        with named(f"Prompt {number} of {len(prompts)}"):
            rows.append(tokenize_prompt(policy.tokenizer, prompt, prefill))
        if room is not None and len(rows[-1]) > room:
            raise ValueError(
                f"Prompt {number} of {len(prompts)} has {len(rows[-1])} tokens, but the model takes "
                f"{policy.max_length}, of which `completion_length` leaves {room}; shorten one of them."
            )
    warn_of_lost_text(policy.tokenizer, prompts, prefill=prefill)
    device = next(policy.model.parameters()).device
    ids, mask = pad_left(rows, policy.facts.pad_token_id)
    nothing: Tensor = torch.zeros(len(rows), dtype=torch.bool)
    return PromptBatch(ids, mask, torch.tensor(numbers), list(prompts), nothing).to(device)
