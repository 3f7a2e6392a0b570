"""The output head at positions: logits, or log-probs of targets whose logits are never kept."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MaskedLMOutput

from dmpo_lightning.models.linear_log_probs import CHUNK_BYTES, linear_log_probs


def predict(
    head: nn.Module,
    hidden: Tensor,
    positions: Tensor | None,
    targets: Tensor | None,
    logit_bias: Tensor | None,
    temperature: float,
) -> MaskedLMOutput | Tensor:
    """The head on hidden states at ``positions``: logits, or float32 log-probs of ``targets``; see
    `LLaDAForMaskedDiffusion`.
    """
    if positions is not None and targets is not None:
        return target_log_probs(head, hidden, targets, logit_bias=logit_bias, temperature=temperature)
    if _is_skinny(head, hidden):
        logits = _few_logits(head, hidden, logit_bias)
    else:
        logits = head(hidden) if logit_bias is None else head(hidden) + logit_bias
    return MaskedLMOutput(logits=logits) if positions is None else logits


def target_log_probs(
    head: nn.Module,
    hidden: Float[Tensor, "*at width"],
    targets: Int[Tensor, "*at"],
    *,
    logit_bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, "*at"]:
    """Float32 log-probs of ``targets`` under softmax((head(hidden) + logit_bias) / temperature), about ``chunk_bytes``
    of scores at a time.

    A plain linear head takes `linear_log_probs`; the chunks of any other are computed again in the backward pass. A
    head with hooks, which some sharding strategies gather for each call, is called once: ranks differ in their number
    of positions, but must call it equally often.
    """
    x, ids = hidden.flatten(0, -2), targets.flatten()
    hooked = _has_hooks(head)
    if type(head) is nn.Linear and not hooked:
        found = linear_log_probs(
            x, head.weight, ids, bias=head.bias, logit_bias=logit_bias, temperature=temperature, chunk_bytes=chunk_bytes
        )
        return found.view(targets.shape)

    def score(x: Tensor, ids: Tensor) -> Tensor:
        logits = head(x)
        return log_probs_of(logits if logit_bias is None else logits + logit_bias, ids, temperature)

    if hooked or logit_bias is None:
        return score(x, ids).view(targets.shape)
    rows = max(1, chunk_bytes // (4 * len(logit_bias)))
    parts = [checkpoint(score, *part, use_reentrant=False) for part in zip(x.split(rows), ids.split(rows), strict=True)]
    return torch.cat(parts).view(targets.shape)


def log_probs_of(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Float32 log-probability of each target under softmax(logits / temperature)."""
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    return -F.cross_entropy(scaled.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


SKINNY_ROWS, TALL_VOCABULARY = 32, 1 << 14
"""Where a processor multiplies a tall matrix by few columns several times faster than few rows by its transpose."""


def _is_skinny(head: Any, hidden: Tensor) -> bool:
    if hidden.device.type != "cpu" or hidden.dtype != torch.float32 or torch.is_grad_enabled():
        return False
    plain = type(head) is nn.Linear and head.bias is None and not _has_hooks(head)
    return plain and len(head.weight) >= TALL_VOCABULARY and hidden.numel() <= SKINNY_ROWS * hidden.shape[-1]


def _few_logits(head: Any, hidden: Tensor, logit_bias: Tensor | None) -> Tensor:
    """What ``head`` returns, by columns instead of rows, two at least; transposed while the bias is added."""
    x = hidden.flatten(0, -2)
    count = len(x)
    columns = head.weight @ (x.expand(2, -1) if count == 1 else x).T
    logits = torch.empty(count, len(columns), dtype=columns.dtype, device=columns.device)
    if logit_bias is None:
        logits.copy_(columns.T[:count])
    else:
        torch.add(columns.T[:count], logit_bias, out=logits)
    return logits.view(*hidden.shape[:-1], len(columns))


def _has_hooks(head: nn.Module) -> bool:
    return any(part._forward_pre_hooks or part._forward_hooks or "forward" in vars(part) for part in head.modules())
