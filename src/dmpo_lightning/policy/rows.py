"""Rows in which a bidirectional model scores maskings of a completion."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def rows_of_replicates(
    prompt_ids: Int[Tensor, "rows prompt"],
    prompt_mask: Bool[Tensor, "rows prompt"],
    noisy: Int[Tensor, "rows replicate length"],
    at: Bool[Tensor, "rows replicate length"],
) -> tuple[Int[Tensor, "all total"], Bool[Tensor, "all total"] | None, Int[Tensor, " chosen"]]:
    """Makes each replicate a row of its own, at the door of the model. The last are flat indices of ``at``."""
    replicates, length = noisy.shape[1:]
    prompt = prompt_ids[:, None].expand(-1, replicates, -1)
    ids = torch.cat((prompt, noisy), dim=-1).flatten(0, 1)
    # Without padding there is no mask, which the fastest kernels of attention do not take.
    is_padded = not bool(prompt_mask.all())
    prompts_mask = prompt_mask.repeat_interleave(replicates, 0)
    attention_mask = full_attention_mask(prompts_mask, length) if is_padded else None
    flat = torch.nn.functional.pad(at.flatten(0, 1), (prompt_ids.shape[1], 0)).flatten().nonzero().squeeze(-1)
    return ids, attention_mask, flat


def full_attention_mask(prompt_mask: Bool[Tensor, "rows prompt"], length: int) -> Bool[Tensor, "rows total"]:
    """The prompt's padding mask, extended over a completion of ``length`` tokens that are all attended."""
    return torch.nn.functional.pad(prompt_mask.bool(), (0, length), value=True)
