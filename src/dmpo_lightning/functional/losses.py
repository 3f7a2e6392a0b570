"""The DMPO losses as pure functions of log-probs and weights."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

LossScale = Literal["count", "length"]
"""``count``: mean over the masked positions, 1/m; ``length``: the paper's L/m, the ELBO's own scale."""


def denoising_cross_entropy(
    token_log_prob: Float[Tensor, "*rows replicate length"],
    masks: Bool[Tensor, "*rows replicate length"],
    *,
    scale: LossScale = "count",
) -> Float[Tensor, "*rows"]:
    """``-(1/m) sum_masked log p``, mean over replicates; with ``scale="length"`` an estimate of -ELBO in nats."""
    full_precision = token_log_prob.to(torch.promote_types(token_log_prob.dtype, torch.float32))
    loss = -((full_precision * masks).sum(-1) / masks.sum(-1)).mean(-1)
    return loss if scale == "count" else loss * masks.shape[-1]


def wdce_loss(
    cross_entropy: Float[Tensor, " rows"], signal: Float[Tensor, " rows"], *, planned_rollouts: int
) -> Float[Tensor, ""]:
    """Weighted denoising cross-entropy of DMPO (arXiv 2510.08233) with ``signal`` = w - b, detached.

    Divided by the number of rollouts that were planned, never by how many were left after skipping those of zero
    signal.
    """
    return (signal.detach() * cross_entropy).sum() / planned_rollouts


def wddo_loss(
    log_ratio: Float[Tensor, " rows"],
    weight: Float[Tensor, " rows"],
    *,
    length: int,
    beta: float,
    planned_rollouts: int,
) -> Float[Tensor, ""]:
    """Weighted direct discriminative optimisation: ``(2 / beta L) F``, ``F = -[w log sigma(beta D) + log sigma(-beta
    D)]``.

    ``log_ratio`` D estimates log p_theta - log p_old on common masks. The factor makes the gradient at theta = old
    equal that of
    WDCE with the group baseline, so learning rate and clipping carry over. With exact log-probs and weights of mean
    1, beta = 1, the
    minimiser is the target itself. The discriminative form follows DDO (arXiv 2503.01103).
    """
    value = -(weight.detach() * F.logsigmoid(beta * log_ratio) + F.logsigmoid(-beta * log_ratio))
    return value.sum() * 2 / (beta * length * planned_rollouts)
