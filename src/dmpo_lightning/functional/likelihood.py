"""Log-likelihood estimates of a completion under a masked diffusion model."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional.masking import QUADRATURE, block_weights


def elbo_replicates(
    token_log_prob: Float[Tensor, "*rows replicate length"],
    masks: Bool[Tensor, "*rows replicate length"],
    blocks: Int[Tensor, "*rows length"] | None = None,
) -> Float[Tensor, "*rows replicate"]:
    """``(L / m) sum_masked log p`` of each replicate, in nats, where m of the L positions are masked.

    This is an unbiased estimate of the evidence lower bound of log p (LLaDA, arXiv 2502.09992) if the masks come from
    `draw_masks`. It is biased low for log p itself, and a non-linear function of it, such as its exponential, is biased
    for that function of the bound.

    With ``blocks`` it is the sum of the blocks' ELBOs, ``(n / m) sum_masked log p`` each, as block-causal models have
    it (BD3-LM, arXiv 2503.09573). With one position per block that is log p itself.
    """
    if blocks is not None:
        return (token_log_prob.float() * block_weights(masks, blocks)).sum(-1)
    count = masks.sum(-1)
    return (token_log_prob.float() * masks).sum(-1) * (masks.shape[-1] / count)


def elbo(
    token_log_prob: Float[Tensor, "*rows replicate length"],
    masks: Bool[Tensor, "*rows replicate length"],
    blocks: Int[Tensor, "*rows length"] | None = None,
) -> Float[Tensor, "*rows"]:
    """Monte Carlo estimate of the ELBO in nats: the mean of `elbo_replicates`, in float32."""
    return elbo_replicates(token_log_prob, masks, blocks).mean(-1)


def complementary_elbo(
    token_log_prob: Float[Tensor, "*rows pairs 2 length"], masks: Bool[Tensor, "*rows pairs 2 length"]
) -> Float[Tensor, "*rows"]:
    """ELBO in nats, ``(n + 1) / (2 m) sum_masked log p`` of a mask and its complement, unbiased as `elbo` is; ESPO."""
    count = masks.sum(-1)
    total = (token_log_prob.float() * masks).sum(-1)
    return (total * (count.sum(-1, keepdim=True) + 1) / (2 * count.clamp(min=1))).sum(-1).mean(-1)


def quadrature_elbo(
    token_log_prob: Float[Tensor, "*rows nodes length"], masks: Bool[Tensor, "*rows nodes length"]
) -> Float[Tensor, "*rows"]:
    """``sum_q w_q (1 / t_q) sum_masked log p`` over `QUADRATURE`: less noise than by chance, and some bias; GDPO."""
    weights = torch.tensor([weight / node for node, weight in QUADRATURE], device=masks.device)
    return ((token_log_prob.float() * masks).sum(-1) * weights).sum(-1)


def mean_eubo(
    token_log_prob: Float[Tensor, "*rows replicate length"],
    masks: Bool[Tensor, "*rows replicate length"],
    counted: Bool[Tensor, "*rows length"],
    *,
    beta: float,
) -> Float[Tensor, "*rows"]:
    """Evidence upper bound per token, ``mean_k (1/b) log mean_draws [masked] p_k^b / t`` nats; SPG (arXiv 2510.09541).

    The mean is over the counted positions that some draw masks, b is ``beta``, and t a draw's masked share of them.
    """
    at = masks & counted[..., None, :]
    share = at.sum(-1, keepdim=True) / counted.sum(-1)[..., None, None]
    # A finite number for what is not masked: of minus infinities alone logsumexp has no gradient.
    exponent = (beta * token_log_prob.float() - share.log()).masked_fill(~at, -1e30)
    seen = at.any(-2)
    bound = (exponent.logsumexp(-2) - math.log(masks.shape[-2])) / beta
    return bound.where(seen, 0).sum(-1) / seen.sum(-1)


def trajectory_log_prob(
    token_log_prob: Float[Tensor, "*rows steps length"], revealed: Bool[Tensor, "*rows steps length"]
) -> Float[Tensor, "*rows"]:
    """log p(completion | order) in nats: the sum of what each denoising step gave the tokens that it revealed.

    It is exact for a sampler whose order does not depend on the tokens and that draws the tokens of one step
    independently of each other.
    """
    return (token_log_prob.float() * revealed).sum((-2, -1))
