"""Rows in which a model scores maskings of completions."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from dmpo_lightning.models.layers import block_numbers, padded_position_ids


@dataclass(frozen=True)
class ScoringRows:
    """What a model is called with, and where in it the log-probs are."""

    ids: Int[Tensor, "all total"]
    attention_mask: Bool[Tensor, "all total"] | Bool[Tensor, "all total total"] | None
    flat: Int[Tensor, " chosen"]
    """Flat indices into ``all x total``, in the order in which `torch.Tensor.nonzero` finds the chosen positions."""
    position_ids: Int[Tensor, "all total"] | None = None
    """The positions of the tokens, where they do not follow from the attention mask."""


def rows_of_replicates(
    prompt_ids: Int[Tensor, "rows prompt"],
    prompt_mask: Bool[Tensor, "rows prompt"],
    noisy: Int[Tensor, "rows replicate length"],
    at: Bool[Tensor, "rows replicate length"],
) -> ScoringRows:
    """Rows of a bidirectional model: each replicate is one of its own. Log-probs are wanted where ``at`` is True."""
    replicates, length = noisy.shape[1:]
    prompt = prompt_ids[:, None].expand(-1, replicates, -1)
    ids = torch.cat((prompt, noisy), dim=-1).flatten(0, 1)
    # Without padding there is no mask, which the fastest kernels of attention do not take.
    is_padded = not bool(prompt_mask.all())
    attention_mask = full_attention_mask(prompt_mask.repeat_interleave(replicates, 0), length) if is_padded else None
    flat = F.pad(at.flatten(0, 1), (prompt_ids.shape[1], 0)).flatten().nonzero().squeeze(-1)
    return ScoringRows(ids, attention_mask, flat)


def full_attention_mask(prompt_mask: Bool[Tensor, "rows prompt"], length: int) -> Bool[Tensor, "rows total"]:
    """The prompt's padding mask, extended over a completion of ``length`` tokens that are all attended."""
    return F.pad(prompt_mask.bool(), (0, length), value=True)


def clean_and_noisy(
    prompt_ids: Int[Tensor, "rows prompt"],
    prompt_mask: Bool[Tensor, "rows prompt"],
    completion_ids: Int[Tensor, "rows length"],
    noisy: Int[Tensor, "rows replicate length"],
    at: Bool[Tensor, "rows replicate length"],
    block_size: int,
    *,
    shifted: bool = False,
) -> ScoringRows:
    """Rows of a block-causal model: ``[clean ; noisy ; noisy ...]``, the replicates as masked copies of the completion.

    A masked token of a copy attends to its own block in that copy and to earlier blocks as they are. Each block is
    thereby predicted as in sampling, where all earlier ones are finished, and the prompt is computed once for all
    copies. The layout is that of BD3-LM (arXiv 2503.09573), but for the prompt's end: where that shares a block with
    the first tokens of the completion it stands in every copy as well, since it sees those tokens masked.

    The first token of a block has in a ``shifted`` model the token before it as its predictor, which is clean when the
    block is sampled. Its log-prob is therefore that of the clean column, which sees no token of the block either.
    """
    copies, length = noisy.shape[1:]
    # The prompt's last columns, with which each copy begins.
    tail = min(block_size - 1, prompt_ids.shape[1])
    start = prompt_ids.shape[1] - tail
    clean = torch.cat((prompt_ids, completion_ids), dim=1)
    attended = full_attention_mask(prompt_mask, length)
    repeated = prompt_ids[:, None, start:].expand(-1, copies, -1)

    def append(whole: Tensor) -> Tensor:
        """A property of the clean columns, for those of the copies as well."""
        return torch.cat((whole, whole[:, start:].repeat(1, copies)), dim=1)

    # Number 0 is what stands there clean, and the copies count from 1.
    copy = torch.arange(copies + 1, device=clean.device).repeat_interleave(
        torch.tensor([clean.shape[1], *[tail + length] * copies], device=clean.device)
    )
    position_ids = append(padded_position_ids(clean, attended))
    blocks = block_numbers(position_ids, block_size)
    query, key = blocks[:, :, None], blocks[:, None, :]
    same, is_clean = copy[:, None] == copy, copy == 0
    mask = torch.where(same, (key == query) | is_clean, is_clean & (key < query)) & append(attended)[:, None]
    ids = torch.cat((clean, torch.cat((repeated, noisy), dim=-1).flatten(1)), dim=1)
    # The column of each token of each copy, ``[rows replicate length]``.
    places = torch.arange(length, device=clean.device)
    first = clean.shape[1] + tail + (tail + length) * torch.arange(copies, device=clean.device)
    columns = (first[:, None] + places).expand_as(at)
    if shifted:
        own = prompt_ids.shape[1] + places
        begins = position_ids[:, None, own] % block_size == 0
        columns = torch.where(begins, own, columns)
    flat = columns + torch.arange(len(ids), device=clean.device)[:, None, None] * ids.shape[1]
    return ScoringRows(ids, mask, flat[at], position_ids)


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
