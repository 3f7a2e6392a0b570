"""Prompt and completion pairs for supervised fine-tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from dmpo_lightning.data.prompts import pad_left
from dmpo_lightning.data.tokens import check_text, named, text_ids, tokenize_prompt, warn_of_lost_text
from dmpo_lightning.distributed.ranks import own_rank
from dmpo_lightning.models.families import family_of_tokenizer
from dmpo_lightning.models.loading import end_token_ids, load_tokenizer
from dmpo_lightning.tasks.base import Split, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class DemonstrationBatch:
    """Prompts padded left, completions filled up with end tokens."""

    prompt_ids: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    completion_ids: Int[Tensor, "batch length"]
    index: Int[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.index)


_Row = tuple[int, list[int], list[int]]
"""A pair: its number, and the tokens of its prompt and of its completion."""


class DemonstrationsDataModule(LightningDataModule):
    """Pairs from a task whose examples hold a ``completion``.

    Args:
        task: gives examples and prompts.
        tokenizer: a tokenizer, or the id or folder of one.
        completion_length: completions are ended and filled up to this many tokens with end tokens. These stay targets,
            since the model must learn to end.
        batch_size: pairs per batch and rank.

    Raises:
        ValueError: a tokenizer without an end token, a completion that does not fit, named by its row (at setup), or
            fewer pairs to train on than a batch (when training starts).

    Example:
        >>> from dmpo_lightning import DemonstrationsDataModule, LatinSquareDemonstrations
        >>> task = LatinSquareDemonstrations(size=10)
        >>> data = DemonstrationsDataModule(task, tokenizer="sudoku_tiny", completion_length=20, batch_size=4)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader())).completion_ids.shape
        torch.Size([4, 20])
    """

    def __init__(
        self,
        task: Task,
        *,
        tokenizer: "str | PreTrainedTokenizerBase",
        completion_length: int,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.task, self.completion_length, self.batch_size = task, completion_length, batch_size
        self.tokenizer = load_tokenizer(tokenizer)
        self._end_of_turn, self._end_of_text = _end_tokens(self.tokenizer)
        self._rows: dict[str, list[_Row]] = {}

    def setup(self, stage: str) -> None:
        splits: tuple[Split, ...] = ("train", "validation")
        for split in splits:
            if split not in self._rows:
                examples = self.task.examples(split)
                self._rows[split] = [self._row(index, example) for index, example in enumerate(examples)]
                prompts = (self.task.prompt(example) for example in examples)
                warn_of_lost_text(self.tokenizer, prompts, kind=f"prompts of {split}", prefill=self.task.prefill)
                completions = (example["completion"] for example in examples)
                warn_of_lost_text(self.tokenizer, completions, kind=f"completions of {split}")

    def train_dataloader(self) -> "DataLoader[_Row]":
        each = -(-len(self._rows["train"]) // own_rank()[1])
        # Incomplete batches are dropped, so that training would end without a step and without a word.
        if each < self.batch_size:
            raise ValueError(
                f"`batch_size` {self.batch_size} is more than the {each} pairs that each rank has to train on, so that "
                "there is no batch; lower it, or give more pairs."
            )
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> "DataLoader[_Row]":
        return self._loader("validation", shuffle=False)

    def _loader(self, split: str, *, shuffle: bool) -> "DataLoader[_Row]":
        rows: Any = self._rows[split]
        return DataLoader(
            rows, batch_size=self.batch_size, shuffle=shuffle, collate_fn=self._collate, drop_last=shuffle
        )

    def _row(self, index: int, example: Mapping[str, Any]) -> _Row:
        with named(f"The completion of row {index}"):
            completion = self._completion_ids(example["completion"])
        with named(f"The prompt of row {index}"):
            prompt = tokenize_prompt(self.tokenizer, self.task.prompt(example), self.task.prefill)
        return index, prompt, completion

    def _completion_ids(self, completion: Any) -> list[int]:
        check_text(completion)
        # As text: a completion that spells the mask token holds none, of which no log-prob would be finite.
        ids = [*text_ids(self.tokenizer, completion), self._end_of_turn]
        if len(ids) > self.completion_length:
            raise ValueError(
                f"it has {len(ids)} tokens with its end token, more than `completion_length` "
                f"{self.completion_length}; raise it or remove the row."
            )
        # A sampler fills a fixed number of positions, so the model must learn with what, behind the end of its turn.
        return ids + [self._end_of_text] * (self.completion_length - len(ids))

    def _collate(self, rows: Sequence[_Row]) -> DemonstrationBatch:
        index, prompts, completions = zip(*rows, strict=True)
        prompt_ids, prompt_mask = pad_left(prompts, self.tokenizer.pad_token_id)
        return DemonstrationBatch(prompt_ids, prompt_mask, torch.tensor(completions), torch.tensor(index))


def _end_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, int]:
    """The ids that end a turn, and a text: an eos token is both, and a separator where there is none, as BERT has it.

    Raises:
        ValueError: the tokenizer has nothing that ends a completion.
    """
    ends = end_token_ids(tokenizer)
    if not ends:
        raise ValueError(
            "The tokenizer has neither an eos token nor a separator, of which one must end a completion; set its "
            "`eos_token`."
        )
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    end_of_text: Any = ends[0] if eos is None else eos
    family = family_of_tokenizer(tokenizer)
    # A family's last end token ends a turn, the one before it a text.
    turns = family.end_tokens if family else ()
    return (tokenizer.get_vocab()[turns[-1]] if turns else end_of_text), end_of_text
