"""Rows in which a block-causal model scores maskings of a completion, all of its blocks in one forward."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dmpo_lightning.models.layers import block_numbers, padded_position_ids


@dataclass(frozen=True)
class CleanAndNoisy:
    """Prompt and completion as they are, followed by masked copies of the completion: ``[clean ; noisy ; noisy ...]``.

    A masked token of a copy attends to its own block in that copy and to earlier blocks as they are. Each block is
    thereby predicted as in sampling, where all earlier ones are finished, and the prompt is computed once for all
    copies. The layout is that of BD3-LM (arXiv 2503.09573), but for the prompt's end: where that shares a block with
    the first tokens of the completion it stands in every copy as well, since it sees those tokens masked.
    """

    ids: Int[Tensor, "rows total"]
    position_ids: Int[Tensor, "rows total"]
    attention_mask: Bool[Tensor, "rows total total"]
    tail: int
    """The number of the prompt's last columns that each copy begins with."""

    @classmethod
    def of(
        cls,
        prompt_ids: Int[Tensor, "rows prompt"],
        prompt_mask: Bool[Tensor, "rows prompt"],
        completion_ids: Int[Tensor, "rows length"],
        noisy: Int[Tensor, "rows copies length"],
        block_size: int,
    ) -> "CleanAndNoisy":
        """The rows of completions whose masked copies are ``noisy``."""
        copies, length = noisy.shape[1:]
        tail = min(block_size - 1, prompt_ids.shape[1])
        start = prompt_ids.shape[1] - tail
        clean = torch.cat((prompt_ids, completion_ids), dim=1)
        attended = torch.nn.functional.pad(prompt_mask.bool(), (0, length), value=True)
        positions = padded_position_ids(clean, attended)
        repeated = prompt_ids[:, None, start:].expand(-1, copies, -1)

        def append(whole: Tensor) -> Tensor:
            """A property of the clean columns, for those of the copies as well."""
            return torch.cat((whole, whole[:, start:].repeat(1, copies)), dim=1)

        # Number 0 is what stands there clean, and the copies count from 1.
        copy = torch.arange(copies + 1, device=clean.device).repeat_interleave(
            torch.tensor([clean.shape[1], *[tail + length] * copies], device=clean.device)
        )
        position_ids = append(positions)
        blocks = block_numbers(position_ids, block_size)
        query, key = blocks[:, :, None], blocks[:, None, :]
        same, is_clean = copy[:, None] == copy, copy == 0
        mask = torch.where(same, (key == query) | is_clean, is_clean & (key < query)) & append(attended)[:, None]
        ids = torch.cat((clean, torch.cat((repeated, noisy), dim=-1).flatten(1)), dim=1)
        return cls(ids, position_ids, mask, tail)

    def flat_positions(self, at: Bool[Tensor, "rows copies length"]) -> Int[Tensor, " chosen"]:
        """Flat indices into the rows of the copies' tokens where ``at`` is True, row by row and copy by copy."""
        copies = torch.nn.functional.pad(at, (self.tail, 0)).flatten(1)
        clean = self.ids.shape[1] - copies.shape[1]
        return torch.nn.functional.pad(copies, (clean, 0)).flatten().nonzero().squeeze(-1)


def completion_blocks(
    prompt_mask: Bool[Tensor, "rows prompt"], ends: Bool[Tensor, "rows length"], block_size: int
) -> Int[Tensor, "rows length"]:
    """The block of each token of a completion, counted from the one that its first token is in.

    It is -1 behind the block of the first end token, True in ``ends``. Sampling stops with that block, and no
    likelihood counts what it never drew.
    """
    prompt_length = prompt_mask.sum(1, keepdim=True)
    places = torch.arange(ends.shape[1], device=ends.device)
    blocks = block_numbers(prompt_length + places, block_size) - block_numbers(prompt_length, block_size)
    last = torch.where(ends.any(1), blocks.gather(1, ends.int().argmax(1, keepdim=True)).squeeze(1), ends.shape[1])
    return torch.where(blocks <= last[:, None], blocks, -1)
