"""The published training loss, written plainly: the baseline of `benchmarks.loss` and an oracle of the tests.

As DMPO, d1 and wd1 train: one forward over prompt and completion, logits at every position of both, the completion's
part of them cut out, the cross-entropy of all its tokens in float32, and the mean over the masked ones of each row.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def weighted_cross_entropy(
    model: nn.Module,
    prompt_ids: Int[Tensor, "rows prompt"],
    completion_ids: Int[Tensor, "rows length"],
    masks: Bool[Tensor, "rows replicate length"],
    signal: Float[Tensor, " rows"],
    *,
    mask_token_id: int,
    ban: Float[Tensor, " vocab"],
) -> Float[Tensor, ""]:
    """Mean over rows of (w - b) times that over replicates of ``(1/m) sum_masked -log p``; prompts are not padded."""
    replicates, length = masks.shape[1], masks.shape[2]
    prompts = prompt_ids.repeat_interleave(replicates, 0)
    targets = completion_ids.repeat_interleave(replicates, 0)
    flat = masks.flatten(0, 1)
    ids = torch.cat((prompts, torch.where(flat, mask_token_id, targets)), dim=1)
    logits = model(ids).logits
    completion = logits[:, -length:].float() + ban
    losses = F.cross_entropy(completion.flatten(0, 1), targets.flatten(), reduction="none").view(flat.shape)
    per_row = ((losses * flat).sum(-1) / flat.sum(-1)).view(-1, replicates).mean(-1)
    return (signal * per_row).mean()
