"""The DMPO losses as pure functions of log-probs and weights."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional.masking import block_weights

NegativeTerm = Literal["likelihood", "log_likelihood"]
"""What rollouts of negative signal minimise: p, or as published log p, which has no lower bound."""


def denoising_cross_entropy(
    token_log_prob: Float[Tensor, "*rows replicate length"],
    masks: Bool[Tensor, "*rows replicate length"],
    blocks: Int[Tensor, "*rows length"] | None = None,
) -> Float[Tensor, "*rows"]:
    """``-(1/m) sum_masked log p``, averaged over replicates, in nats per token.

    It is `elbo` per position that counts, turned round. The paper's L/m is L times this, and Adam takes the same steps
    with it if gradients are clipped at L times the norm.
    """
    return -_masked_mean(_full_precision(token_log_prob), masks, blocks)


def denoising_likelihood(
    token_log_prob: Float[Tensor, "*rows replicate length"],
    masks: Bool[Tensor, "*rows replicate length"],
    blocks: Int[Tensor, "*rows length"] | None = None,
) -> Float[Tensor, "*rows"]:
    """``(1/m) sum_masked p``, averaged over replicates. It is at least 0, where -log p has no such end on its side.

    With ``blocks`` tokens weigh as they do in `denoising_cross_entropy`.
    """
    return _masked_mean(_full_precision(token_log_prob).exp(), masks, blocks)


def wdce_loss(
    cross_entropy: Float[Tensor, " rows"],
    signal: Float[Tensor, " rows"],
    *,
    planned_rollouts: int,
    likelihood: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, ""]:
    """Weighted denoising cross-entropy of DMPO (arXiv 2510.08233), with the weights ``signal`` = w - b.

    ``signal`` is detached: the weights say what to learn and are not learned themselves. The sum is divided by the
    number of rollouts that were planned. Rollouts of zero signal may have been skipped, and dividing by the rest would
    make the step longer the more of them there are.

    With ``likelihood`` (see `denoising_likelihood`), rollouts of negative signal minimise that, not -cross_entropy:
    ``sum_{s > 0} s (-log p) + sum_{s < 0} |s| p``. This form is ours. Every term is at least 0, and so is the loss,
    while the published one falls without bound. Both push each rollout in the same direction; but the published push
    is the same however unlikely a token has become, and this one fades with p, so that it leaves alone what the model
    does not say anyway.
    """
    weight = signal.detach()
    if likelihood is None:
        return (weight * cross_entropy).sum() / planned_rollouts
    return (weight.clamp(min=0) * cross_entropy + (-weight).clamp(min=0) * likelihood).sum() / planned_rollouts


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


def _full_precision(value: Tensor) -> Tensor:
    # Half precision would err by half a nat in such sums; float64 is kept, for tests against exact values.
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _masked_mean(value: Tensor, masks: Tensor, blocks: Tensor | None) -> Tensor:
    if blocks is not None:
        return (value * block_weights(masks, blocks)).sum(-1).mean(-1) / (blocks >= 0).sum(-1)
    return ((value * masks).sum(-1) / masks.sum(-1)).mean(-1)
