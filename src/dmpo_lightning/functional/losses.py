"""The DMPO losses as pure functions of log-probs and weights."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional.masking import block_weights

LossScale = Literal["count", "length"]
"""What the sum over masked positions is multiplied by.

``count`` is 1/m, which makes it a mean. ``length`` is L/m, the scale of the paper and of the ELBO itself.
"""


def denoising_cross_entropy(
    token_log_prob: Float[Tensor, "*rows replicate length"],
    masks: Bool[Tensor, "*rows replicate length"],
    *,
    scale: LossScale = "count",
    blocks: Int[Tensor, "*rows length"] | None = None,
) -> Float[Tensor, "*rows"]:
    """``-(1/m) sum_masked log p``, averaged over replicates, in nats per token.

    With ``scale="length"`` it is ``-(L/m) sum_masked log p``, an estimate of -ELBO in nats. With ``blocks`` either is
    the ELBO of `elbo_replicates`, per position that counts or as it is.
    """
    # Half precision would err by half a nat in such sums; float64 is kept, for tests against exact values.
    full_precision = token_log_prob.to(torch.promote_types(token_log_prob.dtype, torch.float32))
    if blocks is not None:
        bound = -(full_precision * block_weights(masks, blocks)).sum(-1).mean(-1)
        return bound if scale == "length" else bound / (blocks >= 0).sum(-1)
    loss = -((full_precision * masks).sum(-1) / masks.sum(-1)).mean(-1)
    return loss if scale == "count" else loss * masks.shape[-1]


def wdce_loss(
    cross_entropy: Float[Tensor, " rows"], signal: Float[Tensor, " rows"], *, planned_rollouts: int
) -> Float[Tensor, ""]:
    """Weighted denoising cross-entropy of DMPO (arXiv 2510.08233), with the weights ``signal`` = w - b.

    ``signal`` is detached: the weights say what to learn and are not learned themselves. The sum is divided by the
    number of rollouts that were planned. Rollouts of zero signal may have been skipped, and dividing by the rest would
    make the step longer the more of them there are.
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
    """Weighted direct discriminative optimisation: a logistic loss that tells the target from the behaviour policy.

    The loss is ``(2 / beta L) F`` with ``F = -[w log sigma(beta D) + log sigma(-beta D)]``. ``log_ratio`` D estimates
    log p_theta - log p_old in nats, both sides on common masks. The discriminative form follows DDO (arXiv 2503.01103).

    The factor 2 / (beta L) makes the gradient at theta = old equal that of WDCE with the group baseline, so that
    learning rate and clipping carry over. With exact log-probs, weights of mean 1 and beta = 1, the minimiser is the
    target itself.
    """
    # `logsigmoid` stays finite for ratios of any size, the logarithm of a sigmoid does not.
    value = -(weight.detach() * F.logsigmoid(beta * log_ratio) + F.logsigmoid(-beta * log_ratio))
    return value.sum() * 2 / (beta * length * planned_rollouts)
