"""The enumerable oracle: any-order policies over 3 tokens of 2 values, held in a table, with every expectation a sum.

A table ``[*batch context position value]`` holds free logits for each partial assignment and position. It defines the
sequence distribution of unmasking in a uniformly random order, one token per step, at T = 1. Losses and weights are
those of `dmpo_lightning.functional`; the batch axis runs over independent problems (one reference policy each).
"""

from collections.abc import Callable
from itertools import permutations, product

import torch
from torch import Tensor

from dmpo_lightning.functional import (
    denoising_cross_entropy,
    denoising_likelihood,
    elbo,
    group_baseline,
    importance_weights,
    negative_baseline,
    no_baseline,
    policy_baseline,
    trajectory_log_prob,
    trajectory_masks,
    wdce_loss,
)

LENGTH, VALUES, MASK = 3, 2, 2
CONTEXTS = torch.tensor(list(product(range(VALUES + 1), repeat=LENGTH)))
ALL_MASKED = len(CONTEXTS) - 1
COMPLETIONS = torch.tensor(list(product(range(VALUES), repeat=LENGTH)))
REVEAL_STEPS = torch.tensor(list(permutations(range(LENGTH))))
PAIR_COMPLETIONS = COMPLETIONS.repeat(len(REVEAL_STEPS), 1)
PAIR_REVEAL_STEPS = REVEAL_STEPS.repeat_interleave(len(COMPLETIONS), 0)
LOSS_MASKS = torch.stack([rank < count for rank in REVEAL_STEPS for count in range(1, LENGTH + 1)])
"""Every permutation with every count: each as likely as the next, which is how masks are drawn."""
_AGREES = ((CONTEXTS[:, None] == MASK) | (CONTEXTS[:, None] == COMPLETIONS))[:, None] | torch.eye(
    LENGTH, dtype=torch.bool
)[:, None]
_HOLDS = COMPLETIONS.T[:, None] == torch.arange(VALUES)[:, None]
MATCHES = _AGREES.all(-1)[:, :, None] & _HOLDS
"""``[context position value completion]``: the completion has the value there and agrees with the context elsewhere."""


def context_index(ids: Tensor) -> Tensor:
    """The row of the table for completions in which some tokens are `MASK`."""
    return ids @ torch.tensor([(VALUES + 1) ** place for place in reversed(range(LENGTH))])


def token_log_prob(table: Tensor, completions: Tensor, masks: Tensor) -> Tensor:
    """Log-probs ``[*batch row replicate position]`` of ``completions [row position]`` under each replicate's mask."""
    context = context_index(torch.where(masks, MASK, completions[:, None]))
    chosen = completions[:, None, :, None].expand(*masks.shape, 1)
    log_probs = table.log_softmax(-1)[..., context, :, :]
    return log_probs.gather(-1, chosen.expand(*log_probs.shape[:-1], 1)).squeeze(-1)


def pair_log_prob(table: Tensor) -> Tensor:
    """log p(completion | order) ``[*batch pair]``, order-major."""
    masks, revealed = trajectory_masks(PAIR_REVEAL_STEPS, LENGTH)
    log_prob = token_log_prob(table, PAIR_COMPLETIONS, masks)
    return trajectory_log_prob(log_prob, revealed.expand(log_prob.shape))


def sequence_log_prob(table: Tensor) -> Tensor:
    """log p(completion) ``[*batch completion]``: the mixture over all orders."""
    by_order = pair_log_prob(table).unflatten(-1, (len(REVEAL_STEPS), len(COMPLETIONS)))
    return by_order.logsumexp(-2) - torch.tensor(len(REVEAL_STEPS)).log()


def sequential_log_prob(table: Tensor) -> Tensor:
    """log p(completion) ``[*batch completion]`` from left to right."""
    masks, revealed = trajectory_masks(torch.arange(LENGTH).expand(len(COMPLETIONS), -1), LENGTH)
    log_prob = token_log_prob(table, COMPLETIONS, masks)
    return trajectory_log_prob(log_prob, revealed.expand(log_prob.shape))


def exact_elbo(table: Tensor) -> Tensor:
    """The evidence lower bound ``[*batch completion]``, over all masks."""
    masks = LOSS_MASKS.expand(len(COMPLETIONS), -1, -1)
    log_prob = token_log_prob(table, COMPLETIONS, masks)
    return elbo(log_prob, masks.expand(log_prob.shape))


def conditionals(joint: Tensor) -> Tensor:
    """The order-consistent table ``[*batch context position value]`` of a distribution ``[*batch completion]``."""
    return (joint[..., None, None, None, :] * MATCHES).sum(-1).log()


def stationarity_residual(table: Tensor, target: Tensor) -> Tensor:
    """``sum_o (target - p_theta)(o) [o agrees with context] ([o_d = v] - p_theta(v | context))``, shaped like a table.

    Zero where the denoising gradients expected under the target and under the policy itself cancel; computed from
    probabilities alone, without a loss or autograd.
    """
    difference = target - sequence_log_prob(table).exp()
    agreeing = (difference[..., None, None, None, :] * MATCHES).sum(-1)
    residual = agreeing - agreeing.sum(-1, keepdim=True) * table.softmax(-1)
    return residual * (CONTEXTS == MASK)[..., None]


def random_tables(seed: int, *batch: int) -> Tensor:
    """Order-inconsistent tables, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, len(CONTEXTS), LENGTH, VALUES, generator=generator, dtype=torch.float64)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the sum of absolute differences ``[*batch]``."""
    return (p - q).abs().sum(-1) / 2


class Trajectories:
    """The population of (order, completion) pairs; log-probs are exact along the order."""

    completions = PAIR_COMPLETIONS
    log_prob = staticmethod(pair_log_prob)

    @staticmethod
    def log_density(table: Tensor) -> Tensor:
        """How often a policy produces each pair."""
        return pair_log_prob(table) - torch.tensor(len(REVEAL_STEPS)).log()


class Sequential:
    """The population of completions that are sampled from left to right; log-probs are exact along that order."""

    completions = COMPLETIONS
    log_prob = staticmethod(sequential_log_prob)
    log_density = staticmethod(sequential_log_prob)


class Elbos:
    """The population of completions, whatever their order; the enumerated ELBO stands for their log-probs."""

    completions = COMPLETIONS
    log_prob = staticmethod(exact_elbo)
    log_density = staticmethod(sequence_log_prob)


Estimate = type[Trajectories] | type[Sequential] | type[Elbos]


def population_signal(
    baseline: str,
    estimate: Estimate,
    *,
    table: Tensor,
    behaviour: Tensor,
    reference: Tensor,
    reward: Tensor,
    temperature: float,
) -> Tensor:
    """``w - b`` of every member of the population, times G and the member's density under the behaviour policy.

    The whole population is one group. Adding log density to a log-weight turns the group's softmax into
    ``density exp(l) / sum density exp(l)``: density times the weight of an infinite group, normalised by the exact Z.
    """
    log_density = estimate.log_density(behaviour)
    members = log_density.shape[-1] * log_density.exp()
    log_rnd = estimate.log_prob(reference) - estimate.log_prob(behaviour) + log_density
    weights = importance_weights(log_rnd, reward, reward_temperature=temperature)
    match baseline:
        case "none":
            return weights - members * no_baseline(reward)
        case "group":
            return weights - members * group_baseline(reward)
        case "negative":
            return weights - negative_baseline(weights, log_rnd, reward, reward_temperature=temperature)
        case "policy":
            return weights - policy_baseline(estimate.log_prob(table) + log_density, estimate.log_prob(behaviour))
    raise ValueError(f"`baseline` must be none, group, negative or policy, got {baseline!r}.")


def population_loss(
    table: Tensor,
    completions: Tensor,
    signal: Tensor,
    *,
    negative_term: str = "log_likelihood",
) -> Tensor:
    """The WDCE loss summed over the batch of problems, with every mask enumerated."""
    masks = LOSS_MASKS.expand(len(completions), -1, -1)
    log_prob = token_log_prob(table, completions, masks)
    masks = masks.expand(log_prob.shape)
    cross_entropy = denoising_cross_entropy(log_prob, masks)
    likelihood = denoising_likelihood(log_prob, masks).flatten() if negative_term == "likelihood" else None
    return wdce_loss(
        cross_entropy.flatten(), signal.flatten(), planned_rollouts=len(completions), likelihood=likelihood
    )


def train(table: Tensor, loss: Callable[[Tensor, int], Tensor], *, steps: int, learning_rate: float = 0.1) -> Tensor:
    """The table after Adam steps with cosine decay on ``loss(table, step)``."""
    table = table.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(table, step).backward()
        optimizer.step()
        schedule.step()
    return table.detach()
