"""Log-likelihood estimates of a completion under a masked diffusion model."""

from jaxtyping import Bool, Float
from torch import Tensor


def elbo_replicates(
    token_log_prob: Float[Tensor, "*rows replicate length"], masks: Bool[Tensor, "*rows replicate length"]
) -> Float[Tensor, "*rows replicate"]:
    """``(L / m) sum_masked log p`` of each replicate, in nats, where m of the L positions are masked.

    This is an unbiased estimate of the evidence lower bound of log p (LLaDA, arXiv 2502.09992) if the masks come from
    `draw_masks`. It is biased low for log p itself, and a non-linear function of it, such as its exponential, is biased
    for that function of the bound.
    """
    count = masks.sum(-1)
    return (token_log_prob.float() * masks).sum(-1) * (masks.shape[-1] / count)


def elbo(
    token_log_prob: Float[Tensor, "*rows replicate length"], masks: Bool[Tensor, "*rows replicate length"]
) -> Float[Tensor, "*rows"]:
    """Monte Carlo estimate of the ELBO in nats: the mean of `elbo_replicates`, in float32."""
    return elbo_replicates(token_log_prob, masks).mean(-1)


def elbo_log_rnd(
    reference: Float[Tensor, "*rows replicate length"],
    behaviour: Float[Tensor, "*rows replicate length"],
    masks: Bool[Tensor, "*rows replicate length"],
) -> Float[Tensor, "*rows"]:
    """Estimates log p_ref - log p_old in nats as the difference of two ELBOs.

    Both sides must be evaluated on the *same* masks. The noise that the choice of masks adds then largely cancels.
    """
    return elbo(reference, masks) - elbo(behaviour, masks)


def trajectory_log_prob(
    token_log_prob: Float[Tensor, "*rows steps length"], revealed: Bool[Tensor, "*rows steps length"]
) -> Float[Tensor, "*rows"]:
    """log p(completion | order) in nats: the sum of what each denoising step gave the tokens that it revealed.

    It is exact for a sampler whose order does not depend on the tokens and that draws the tokens of one step
    independently of each other.
    """
    return (token_log_prob.float() * revealed).sum((-2, -1))
