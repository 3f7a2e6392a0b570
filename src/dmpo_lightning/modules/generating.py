"""Answers to prompts of one's own, with how each came about."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from dmpo_lightning.data.prompts import pad_left
from dmpo_lightning.data.tokens import tokenize_prompt
from dmpo_lightning.distributed.internals import attached_trainer
from dmpo_lightning.evaluation.batch import EVALUATION
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import PromptBatch, check_counts, sample_completions
from dmpo_lightning.samplers import Change, ConfidenceSampler, Sampler, observed
from dmpo_lightning.tasks.base import Message

Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class Generation:
    """One answer to a prompt, and of each of its tokens when and how surely it was revealed."""

    prompt: Prompt
    index: int
    """The number of the prompt, which keys the draws as its place in a dataset does in a validation."""
    rollout: int
    """The number of this answer among those to the same prompt."""
    text: str
    """Up to the first end token, without special tokens."""
    ids: list[int]
    """All tokens of the completion, with those from the end token on."""
    steps: list[int | None]
    """The denoising step that revealed each token, from 0. None where an early exit filled it in."""
    confidence: list[float | None]
    """The probability of each token at temperature 1 in that step. None where an early exit filled it in, and for
    samplers that keep no `Canvas`.
    """


class GeneratingModule(LightningModule):
    """A LightningModule around a policy, which answers prompts. Use `DMPO` or `MaskedSFT`."""

    policy: Policy
    seed: int
    phase: Callable[[str], AbstractContextManager[None]]

    def gathered(self) -> AbstractContextManager[None]:
        """What a module does with its weights while it samples, which is nothing by itself."""
        return nullcontext()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        sampler: Sampler | None = None,
        completion_length: int | None = None,
        completions: int = 1,
        prefill: str = "",
        seed: int | None = None,
        index: Sequence[int] | None = None,
        rows_per_forward: int | None = None,
        on_change: Callable[[Change], None] | None = None,
    ) -> list[Generation]:
        """Answers prompts, within a Trainer or without one, as `generate` describes it.

        What is not given is the module's own: the sampler of its rollouts, the length of its completions, its seed.
        `MaskedSFT` takes the most likely tokens one by one, and has to be told a length. With several ranks all call
        this together, each for prompts of its own, if the strategy divides weights equally many.

        Example:
            ```python
            module = DMPO.load_from_checkpoint("runs/sudoku_tiny/latest/checkpoints/last.ckpt")
            print(module.generate("1030041003004001")[0].text)
            ```
        """
        # Modules for supervised fine-tuning have neither.
        own_sampler, own_length = getattr(self, "sampler", None), getattr(self, "completion_length", None)
        length = own_length if completion_length is None else completion_length
        if length is None:
            raise ValueError(
                f"`completion_length` must be given, because {type(self).__name__} has none: pass generate(prompts, "
                "completion_length=...)."
            )
        # As Lightning does it around a validation step.
        trainer = attached_trainer(self)
        precision = nullcontext() if trainer is None else trainer.precision_plugin.forward_context()
        with self.gathered(), self.phase("generation"), precision:
            return generate(
                self.policy,
                prompts,
                sampler=sampler or own_sampler or ConfidenceSampler(temperature=0.0),
                completion_length=length,
                completions=completions,
                prefill=prefill,
                seed=self.seed if seed is None else seed,
                index=index,
                rows_per_forward=rows_per_forward,
                on_change=on_change,
            )


def generate(
    policy: Policy,
    prompts: Prompt | Sequence[Prompt],
    *,
    sampler: Sampler,
    completion_length: int,
    completions: int = 1,
    prefill: str = "",
    seed: int = 0,
    index: Sequence[int] | None = None,
    rows_per_forward: int | None = None,
    on_change: Callable[[Change], None] | None = None,
) -> list[Generation]:
    """Samples answers to prompts, in eval mode and without gradient.

    An answer is the one that a validation with the same seed samples for a prompt at that place of its dataset. It
    depends on nothing else: neither on the other prompts nor on how many rows are sampled at a time. No generator of
    Python or torch is used.

    Args:
        policy: of the answers.
        prompts: texts, each a user's turn, or conversations. A single one need not stand in a list.
        sampler: unmasks the completions.
        completion_length: tokens per completion.
        completions: answers to each prompt.
        prefill: what the assistant's turn starts with. It is part of the prompt, not of the answer.
        seed: of the draws.
        index: the numbers of the prompts, which key their draws. None counts them from 0.
        rows_per_forward: completions that are sampled at a time. None samples all at once.
        on_change: is shown each step, see `observed`. Rows are counted in the order of the answers.

    Returns:
        The answers, prompt by prompt.

    Raises:
        ValueError: no prompt at all, one that is none or too long, or a length that the sampler cannot unmask.
    """
    asked: list[Prompt] = _listed(prompts)
    check_counts(completion_length=completion_length, completions=completions, rows_per_forward=rows_per_forward)
    sampler.validate(completion_length)
    sampler.validate_policy(policy)
    batch = _batch(policy, asked, index, prefill, room=(policy.max_length or 0) - completion_length)
    shape = (len(asked) * completions, completion_length)
    confidence = torch.full(shape, torch.nan, device=batch.prompt_ids.device)

    def note(change: Change) -> None:
        confidence[change.rows] = torch.where(change.written, change.confidence, confidence[change.rows])
        if on_change is not None:
            on_change(change)

    with observed(note):
        samples, _ = sample_completions(
            policy,
            sampler,
            batch,
            group_size=completions,
            completion_length=completion_length,
            seed=seed,
            iteration=EVALUATION,
            rows_per_forward=rows_per_forward,
        )
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
    policy: Policy, prompts: Sequence[Prompt], index: Sequence[int] | None, prefill: str, *, room: int
) -> PromptBatch:
    """The prompts as a loader would hand them out. ``room`` is that for a prompt, where the model states a limit."""
    numbers = list(range(len(prompts))) if index is None else list(index)
    if len(numbers) != len(prompts):
        raise ValueError(f"`index` must hold a number for each prompt, got {len(numbers)} for {len(prompts)}.")
    rows = []
    for number, prompt in enumerate(prompts, 1):
        try:
            rows.append(tokenize_prompt(policy.tokenizer, prompt, prefill))
        except ValueError as error:
            raise ValueError(f"Prompt {number} of {len(prompts)}: {error}") from error
        if policy.max_length is not None and len(rows[-1]) > room:
            raise ValueError(
                f"Prompt {number} of {len(prompts)} has {len(rows[-1])} tokens, but the model takes "
                f"{policy.max_length}, of which `completion_length` leaves {room}; shorten one of them."
            )
    device = next(policy.model.parameters()).device
    ids, mask = pad_left(rows, policy.facts.pad_token_id)
    nothing: Tensor = torch.zeros(len(rows), dtype=torch.bool)
    return PromptBatch(ids, mask, torch.tensor(numbers), list(prompts), nothing).to(device)
