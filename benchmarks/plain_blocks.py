"""Decoding of block-causal models with nothing kept: the baseline of `benchmarks.blocks`.

What one denoising step does, and no more: a forward over the prompt, all finished blocks and the current one, with the
head at every position; the arg-max and its probability at the current block's positions (in float64, as the published
code of SDAR and LLaDA has it); a loop over rows that reveals the most confident masked position of each.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from benchmarks.plain import Generated, confidence_of, draw_tokens, transfer_rows
from dmpo_lightning.models.sdar import SDARForMaskedDiffusion


@torch.no_grad()
def generate(
    model: SDARForMaskedDiffusion,
    prompt_ids: Int[Tensor, "rows prompt"],
    *,
    completion_length: int,
    mask_token_id: int,
) -> Generated:
    """Greedy completions of prompts of one length, one token per step, in the blocks that the model has.

    No row is ended by an end token, and the mask token is never chosen.
    """
    ids = F.pad(prompt_ids, (0, completion_length), value=mask_token_id)
    reveal_step, forwards = torch.full_like(ids, -1), 0
    first = prompt_ids.shape[1] // model.block_size * model.block_size
    for start in range(first, ids.shape[1], model.block_size):
        block = slice(start, min(start + model.block_size, ids.shape[1]))
        while bool((masked := ids[:, block] == mask_token_id).any()):
            logits = model(ids[:, : block.stop]).logits[:, block]
            logits[..., mask_token_id] = -torch.inf
            tokens = draw_tokens(logits, 0.0, None)
            confidence = confidence_of(tokens, logits, "low_confidence", None)
            chosen = transfer_rows(confidence, masked, count=masked.any(1).long())
            ids[:, block][chosen] = tokens[chosen]
            reveal_step[:, block][chosen] = forwards
            forwards += 1
    completion = slice(prompt_ids.shape[1], None)
    return Generated(ids[:, completion], reveal_step[:, completion], forwards)
