"""Prompt batches: tokenised, padded left, sharded over ranks, repeated for the rollout buffer, resumable."""

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dmpo_lightning.data.tokens import named, tokenize_prompt, warn_of_lost_text
from dmpo_lightning.distributed.ranks import own_rank
from dmpo_lightning.models.loading import load_tokenizer
from dmpo_lightning.rollout import PromptBatch
from dmpo_lightning.tasks.base import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptFunction = Callable[[Any], "str | Sequence[Message]"]

logger = logging.getLogger(__name__)


def pad_left(
    rows: Sequence[Sequence[int]], pad: int | None
) -> tuple[Int[Tensor, "batch prompt"], Bool[Tensor, "batch prompt"]]:
    """Ids padded on the left to the longest row, and the mask that is False on the padding.

    Padding is masked, so that ``pad`` may be any id, and is 0 where the tokenizer names none.
    """
    width = max(map(len, rows))
    ids = [[pad or 0] * (width - len(row)) + list(row) for row in rows]
    empty = torch.tensor([width - len(row) for row in rows])
    return torch.tensor(ids), torch.arange(width) >= empty[:, None]


class PromptLoader:
    """Batches of prompts for `DMPO`, which takes no other kind of training loader.

    In training each batch comes as many times as the rollouts made of it are used. `DMPO` sets that number. Nothing is
    skipped therefore, and an epoch has a length. Groups never cross ranks: each rank takes its own prompts, and the
    last batch wraps around to stay full. In evaluation every example comes exactly once over all ranks, and filler rows
    keep the ranks in step.

    For loaders made of others, ``token_ids`` holds the tokens of every prompt of ``dataset``, in its order, and
    ``kept`` the positions of those that are not dropped as too long.

    Args:
        dataset: a sequence of examples of any kind.
        tokenizer: a tokenizer, or the id or folder of one.
        batch_size: prompts per batch and rank.
        prompt: an example's user turn or conversation. None takes example["prompt"].
        prefill: what the assistant's turn starts with. It is part of the prompt, not of the completion.
        shuffle: whether each epoch has a new keyed order, as in training.
        max_prompt_length: leaves out the prompts with more tokens, and counts them in `dropped`. None takes all, and a
            prompt that the model has no room for is an error.

    Raises:
        ValueError: an empty dataset, a batch size below 1, only prompts longer than allowed, or one that is none, named
            by its row.

    Example:
        >>> from dmpo_lightning import PromptLoader
        >>> loader = PromptLoader([{"prompt": "12"}, {"prompt": "4"}], "sudoku_tiny", batch_size=2)
        >>> next(iter(loader)).prompt_ids.shape
        torch.Size([2, 12])
    """

    def __init__(
        self,
        dataset: Sequence[Any],
        tokenizer: "str | PreTrainedTokenizerBase",
        *,
        batch_size: int,
        prompt: PromptFunction | None = None,
        prefill: str = "",
        shuffle: bool = True,
        max_prompt_length: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1 prompt, got {batch_size}.")
        if len(dataset) == 0:
            raise ValueError("`dataset` is empty; DMPO needs at least one prompt.")
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, 0
        self.tokenizer = load_tokenizer(tokenizer)
        self.prompt, self.prefill = prompt or _own_prompt, prefill
        # All at once, so that a prompt that is none is an error now and not in the middle of the run.
        self.token_ids: list[list[int]] = self._tokenized()
        longest = math.inf if max_prompt_length is None else max_prompt_length
        self.kept = [row for row, ids in enumerate(self.token_ids) if len(ids) <= longest]
        if not self.kept:
            raise ValueError(f"All {len(dataset)} prompts are longer than {longest} tokens; raise `max_prompt_length`.")
        if self.dropped:
            logger.warning("Dropped %d of %d prompts of more than %d tokens.", self.dropped, len(dataset), longest)
        self._limit_batches: int | float = 1.0
        self._overfits = False
        self.repeats, self.is_training = 1, False
        # The first `__iter__` starts epoch 0.
        self._epoch, self._handed_out, self._resume_at = -1, 0, 0

    def _tokenized(self) -> list[list[int]]:
        prompts, ids = [], []
        for row, example in enumerate(self.dataset):
            with named(f"Prompt {row} of the dataset"):
                prompts.append(self.prompt(example))
                ids.append(tokenize_prompt(self.tokenizer, prompts[-1], self.prefill))
        warn_of_lost_text(self.tokenizer, prompts, prefill=self.prefill)
        return ids

    @property
    def dropped(self) -> int:
        """How many prompts are left out because they are too long."""
        return len(self.dataset) - len(self.kept)

    def check_prompt_length(self, limit: int) -> None:
        """Raises a ValueError that names the first prompt above ``limit`` tokens. Prompts are never cut."""
        too_long = [row for row in self.kept if len(self.token_ids[row]) > limit]
        if too_long:
            raise ValueError(
                f"Prompt {too_long[0]} of the dataset has {len(self.token_ids[too_long[0]])} tokens, but at most "
                f"{limit} are allowed ({len(too_long)} of {len(self.dataset)} prompts are too long); shorten the "
                f"completion, or leave such prompts out by max_prompt_length: {limit}."
            )

    def bind(
        self, *, repeats: int, seed: int, limit_batches: int | float = 1.0, overfits: bool = False, epoch: int = 0
    ) -> "PromptLoader":
        """Called by the module for its training loader.

        Args:
            repeats: how often each batch is used.
            seed: of the order.
            limit_batches: batches, or the share of them, after which the Trainer ends an epoch.
            overfits: whether each epoch is the same, in the order of the dataset (`overfit_batches`).
            epoch: the epoch that a new loader starts with.
        """
        self.repeats, self.seed, self.is_training = repeats, seed, True
        self._limit_batches, self._overfits = limit_batches, overfits
        if self._epoch < 0:
            self.start_epoch(epoch)
        return self

    def start_epoch(self, epoch: int) -> None:
        """The next epoch is this one, from its beginning."""
        self._epoch, self._handed_out, self._resume_at = epoch - 1, 0, 0

    def __len__(self) -> int:
        return -(-len(self.kept) // self._prompts_per_batch) * self.repeats

    def __iter__(self) -> Iterator[PromptBatch]:
        """One epoch, or after `load_state_dict` the rest of the interrupted one."""
        start, self._resume_at = self._resume_at, 0
        # A checkpoint of the end of an epoch has nothing left to hand out. What follows is the next one.
        if not 0 < start < self._epoch_length:
            start, self._epoch = 0, self._epoch + 1
        order = self._order()
        for step in range(start, len(self)):
            # Counted once it is there: making it runs code of the dataset's own, which may fail.
            batch = self._batch(order, step // self.repeats)
            self._handed_out = step + 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and batches handed out in it, and what a batch is."""
        return {
            "epoch": self._epoch,
            "handed_out": self._handed_out,
            "repeats": self.repeats,
            "prompts_per_batch": self._prompts_per_batch,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues after the last batch handed out.

        Where batches are of another size now, it continues after the last prompt handed out.
        """
        start = state["handed_out"]
        if (state["repeats"], state["prompts_per_batch"]) != (self.repeats, self._prompts_per_batch):
            # Rounded up twice: no prompt comes again in this epoch, and in exchange a few may not come in it.
            prompts = -(-start // state["repeats"]) * state["prompts_per_batch"]
            start = -(-prompts // self._prompts_per_batch) * self.repeats
        self._epoch, self._handed_out, self._resume_at = state["epoch"], start, start

    @property
    def _prompts_per_batch(self) -> int:
        return self.batch_size * own_rank()[1]

    @property
    def _epoch_length(self) -> int:
        """Batches after which the Trainer starts a new epoch."""
        limit = self._limit_batches
        # As Lightning reads its flag: 1 is one batch, 1.0 is all of them.
        return min(limit, len(self)) if isinstance(limit, int) else int(limit * len(self))

    def _order(self) -> list[int]:
        if not self.shuffle or self._overfits:
            return self.kept
        # A text seeds Python's generator by SHA-512, in the same way in every process. A tuple would be refused.
        return random.Random(f"{self.seed}-prompts-{self._epoch}").sample(self.kept, len(self.kept))

    def _batch(self, order: list[int], number: int) -> PromptBatch:
        rank, world_size = own_rank()
        # Ranks take neighbouring pieces of one order. Together they use what a single rank with a larger batch would.
        first = (number * world_size + rank) * self.batch_size
        numbers = range(first, first + self.batch_size)
        # Filled up from the front, so that every rank has a full batch, and groups and steps keep their sizes.
        rows = [order[number % len(order)] for number in numbers]
        # In training a last batch that wraps around holds real prompts, since their rollouts are trained on.
        filler = [not self.is_training and number >= len(order) for number in numbers]
        prompt_ids, prompt_mask = pad_left([self.token_ids[row] for row in rows], self.tokenizer.pad_token_id)
        return PromptBatch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            prompt_index=torch.tensor(rows),
            examples=[self.dataset[row] for row in rows],
            is_filler=torch.tensor(filler),
        )


def _own_prompt(example: Any) -> Any:
    """The prompt that an example holds."""
    try:
        return example["prompt"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(
            f"the example must hold a `prompt`, got {str(example)[:80]!r}; or pass `prompt`, a function of the example."
        ) from None
