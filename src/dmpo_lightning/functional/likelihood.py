"""Log-likelihood estimates of a completion under a masked diffusion model."""

from jaxtyping import Bool, Float
from torch import Tensor


def elbo_replicates(
    token_log_prob: Float[Tensor, "*rows replicate length"], masks: Bool[Tensor, "*rows replicate length"]
) -> Float[Tensor, "*rows replicate"]:
    """``(L / m) sum_masked log p`` of each replicate: unbiased for the evidence lower bound of log p (LLaDA, arXiv
    2502.09992), in nats.

    Biased low for log p itself, and not unbiased for any non-linear function of the bound.
    """
    count = masks.sum(-1)
    return (token_log_prob.float() * masks).sum(-1) * (masks.shape[-1] / count)


def elbo(
    token_log_prob: Float[Tensor, "*rows replicate length"], masks: Bool[Tensor, "*rows replicate length"]
) -> Float[Tensor, "*rows"]:
    """Monte Carlo ELBO: the mean of `elbo_replicates`, float32."""
    return elbo_replicates(token_log_prob, masks).mean(-1)


def elbo_log_rnd(
    reference: Float[Tensor, "*rows replicate length"],
    behaviour: Float[Tensor, "*rows replicate length"],
    masks: Bool[Tensor, "*rows replicate length"],
) -> Float[Tensor, "*rows"]:
    """Log p_ref - log p_old from token log-probs on the *same* masks, so that the masking noise of the two largely
    cancels.
    """
    return elbo(reference, masks) - elbo(behaviour, masks)


def trajectory_log_prob(
    token_log_prob: Float[Tensor, "*rows steps length"], revealed: Bool[Tensor, "*rows steps length"]
) -> Float[Tensor, "*rows"]:
    """Log p(completion | order): exact for a sampler whose order does not depend on the tokens, each step's tokens
    independent.
    """
    return (token_log_prob.float() * revealed).sum((-2, -1))
