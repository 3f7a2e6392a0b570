"""The output head, computed where it is needed only: logits, or log-probs of targets without keeping their logits."""

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
    """What a native model returns for the hidden states at ``positions``.

    That is logits, or float32 log-probs of ``targets`` where both are given. The arguments and results are those of
    `LLaDAForMaskedDiffusion.forward`.
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
    """Float32 log-probs of ``targets`` under softmax((head(hidden) + logit_bias) / temperature).

    About ``chunk_bytes`` of scores exist at a time. A plain linear head takes `linear_log_probs`. Any other head is
    called in chunks of positions, which the backward pass computes again instead of keeping them.
    """
    x, ids = hidden.flatten(0, -2), targets.flatten()
    # Some sharding strategies gather the head's weights in a hook, at each call. Ranks differ in their number of
    # positions but must gather equally often, so such a head is called once, for all positions.
    hooked = _has_hooks(head)
    if type(head) is nn.Linear and not hooked:
        log_probs = linear_log_probs(
            x, head.weight, ids, bias=head.bias, logit_bias=logit_bias, temperature=temperature, chunk_bytes=chunk_bytes
        )
        return log_probs.view(targets.shape)

    def score(x: Tensor, ids: Tensor) -> Tensor:
        logits = head(x)
        return log_probs_of(logits if logit_bias is None else logits + logit_bias, ids, temperature)

    if hooked or logit_bias is None:
        return score(x, ids).view(targets.shape)
    rows = max(1, chunk_bytes // (4 * len(logit_bias)))
    parts = [checkpoint(score, *part, use_reentrant=False) for part in zip(x.split(rows), ids.split(rows), strict=True)]
    return torch.cat(parts).view(targets.shape)


def log_probs_of(
    logits: Float[Tensor, "*at vocab"], targets: Int[Tensor, "*at"], temperature: float = 1.0
) -> Float[Tensor, "*at"]:
    """Float32 log-probability of each target under softmax(logits / temperature)."""
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    return -F.cross_entropy(scaled.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


SKINNY_ROWS, TALL_VOCABULARY = 32, 1 << 14
"""Up to how many hidden states, and from what vocabulary on, a CPU is several times faster by columns than by rows."""


def _is_skinny(head: Any, hidden: Tensor) -> bool:
    """Whether `_few_logits` may take the place of the head, and pays."""
    if hidden.device.type != "cpu" or hidden.dtype != torch.float32 or torch.is_grad_enabled():
        return False
    plain = type(head) is nn.Linear and head.bias is None and not _has_hooks(head)
    return plain and len(head.weight) >= TALL_VOCABULARY and hidden.numel() <= SKINNY_ROWS * hidden.shape[-1]


def _few_logits(head: Any, hidden: Tensor, logit_bias: Tensor | None) -> Tensor:
    """What ``head`` returns for a few hidden states, computed as ``weight @ hidden.T`` on a CPU.

    A CPU multiplies a tall matrix by few columns several times faster than few rows by the transpose of that matrix.
    """
    x = hidden.flatten(0, -2)
    count = len(x)
    # For a single column the library takes its product of matrix and vector, which took 9.4 instead of 2.4 ms where it
    # was measured (docs/performance.md). So there are two columns at least, of which the second is thrown away.
    columns = head.weight @ (x.expand(2, -1) if count == 1 else x).T
    # The result is by columns but is wanted by rows. Adding the bias writes it anyway, so it is transposed on the way.
    logits = torch.empty(count, len(columns), dtype=columns.dtype, device=columns.device)
    if logit_bias is None:
        logits.copy_(columns.T[:count])
    else:
        torch.add(columns.T[:count], logit_bias, out=logits)
    return logits.view(*hidden.shape[:-1], len(columns))


def _has_hooks(head: nn.Module) -> bool:
    """Whether calling the head does more than its class says: by hooks, or by a ``forward`` put on the instance."""
    return any(part._forward_pre_hooks or part._forward_hooks or "forward" in vars(part) for part in head.modules())
