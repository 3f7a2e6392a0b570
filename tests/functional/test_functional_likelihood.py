"""Log-likelihood estimates, against full enumeration of a random conditional model."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from dmpo_lightning.functional import (
    antithetic_pair,
    elbo,
    elbo_replicates,
    trajectory_log_prob,
    trajectory_masks,
)

LENGTHS = [1, 2, 3, 4, 5, 6]


def subsets(length: int) -> Tensor:
    """All non-empty masks, in the order of their binary numbers 1, 2, ..."""
    numbers = torch.arange(1, 2**length)
    return (numbers[:, None] >> torch.arange(length)) % 2 == 1


def conditional_model(length: int, seed: int = 0) -> Tensor:
    """Log-probs ``[mask position]`` of a completion's own tokens: arbitrary, hence order-inconsistent."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2**length, length, generator=generator).mul(2).sigmoid().log()


def token_log_prob(model: Tensor, masks: Tensor) -> Tensor:
    numbers = masks.long() @ 2 ** torch.arange(masks.shape[-1])
    return torch.where(masks, model[numbers], 0.0)


def defined_elbo(model: Tensor, length: int) -> Tensor:
    """``mean over m of (L / m) mean over |mask| = m of sum_masked log p``, as the definition says."""
    masks = subsets(length)
    total, count = token_log_prob(model, masks).sum(-1), masks.sum(-1)
    return torch.stack([length / m * total[count == m].mean() for m in range(1, length + 1)]).mean()


def permutations_and_counts(length: int) -> tuple[Tensor, Tensor]:
    """Each rank tensor with each count: all that an antithetic pair is made from, equally likely."""
    ranks = torch.tensor(list(permutations(range(length))))
    counts = torch.arange(1, length + 1)
    return ranks.repeat_interleave(length, 0), counts.repeat(len(ranks))


@pytest.mark.parametrize("length", LENGTHS)
def test_elbo_is_unbiased_for_plain_masks(length):
    rank, count = permutations_and_counts(length)
    masks = (rank < count[:, None])[:, None]
    model = conditional_model(length)
    torch.testing.assert_close(elbo(token_log_prob(model, masks), masks).mean(), defined_elbo(model, length))


@pytest.mark.parametrize("length", LENGTHS)
def test_elbo_is_unbiased_for_antithetic_pairs(length):
    masks = torch.stack(antithetic_pair(*permutations_and_counts(length)), dim=1)
    model = conditional_model(length)
    torch.testing.assert_close(elbo(token_log_prob(model, masks), masks).mean(), defined_elbo(model, length))


@pytest.mark.parametrize("length", LENGTHS)
def test_each_member_of_a_pair_is_unbiased_by_itself(length):
    masks = torch.stack(antithetic_pair(*permutations_and_counts(length)), dim=1)
    model = conditional_model(length)
    members = elbo_replicates(token_log_prob(model, masks), masks).mean(0)
    torch.testing.assert_close(members, defined_elbo(model, length).expand(2))


@pytest.mark.parametrize("length", LENGTHS[1:])
def test_plain_complements_would_be_biased_by_the_all_masked_term(length):
    rank, count = permutations_and_counts(length)
    mask = rank < count[:, None]
    model = conditional_model(length)

    def estimate(masks: Tensor) -> Tensor:
        """An empty mask has no tokens, so it contributes nothing."""
        return length * token_log_prob(model, masks).sum(-1) / masks.sum(-1).clamp(min=1)

    # (L / m) sum over an all-masked completion is h itself; its complement, which should stand for it, is empty.
    all_masked = model[-1].sum()
    bias = (estimate(mask) + estimate(~mask)).mean() / 2 - defined_elbo(model, length)
    torch.testing.assert_close(bias, -all_masked / (2 * length))
    assert bias > 0.01


@pytest.mark.parametrize("length", [2, 3, 4])
def test_elbo_is_the_mean_log_prob_over_all_orders(length):
    reveal_step = torch.tensor(list(permutations(range(length))))
    masks, revealed = trajectory_masks(reveal_step, steps=length)
    model = conditional_model(length)
    by_order = trajectory_log_prob(token_log_prob(model, masks), revealed)
    torch.testing.assert_close(by_order.mean(), defined_elbo(model, length))


def test_trajectory_log_prob_is_the_product_of_the_conditionals_along_the_order():
    # Order 2, 0, 1. Masked sets as binary numbers: {0, 1, 2} = 7, then {0, 1} = 3, then {1} = 2.
    model = conditional_model(3)
    masks, revealed = trajectory_masks(torch.tensor([1, 2, 0]), steps=3)
    probability = model[7, 2].exp() * model[3, 0].exp() * model[2, 1].exp()
    torch.testing.assert_close(trajectory_log_prob(token_log_prob(model, masks), revealed).exp(), probability)


def test_tokens_revealed_in_one_step_are_conditioned_on_the_same_context():
    # Position 1 first, then 0 and 2 at once, both given position 1 only: masked sets {0, 1, 2} = 7 and {0, 2} = 5.
    model = conditional_model(3)
    masks, revealed = trajectory_masks(torch.tensor([1, 0, 1]), steps=2)
    expected = model[7, 1] + model[5, 0] + model[5, 2]
    torch.testing.assert_close(trajectory_log_prob(token_log_prob(model, masks), revealed), expected)


def test_elbo_of_two_replicates_by_hand():
    # (3 / 2)(-1 - 2) = -4.5 and (3 / 1)(-4) = -12; their mean is -8.25.
    log_prob = torch.tensor([[-1.0, -2.0, 0.0], [0.0, 0.0, -4.0]])
    masks = torch.tensor([[True, True, False], [False, False, True]])
    assert elbo_replicates(log_prob, masks).tolist() == [-4.5, -12.0]
    assert elbo(log_prob, masks).item() == -8.25


def test_elbo_ignores_what_is_not_masked():
    masks = torch.tensor([[True, False]])
    assert elbo(torch.tensor([[-1.0, -5.0]]), masks) == elbo(torch.tensor([[-1.0, 0.0]]), masks) == -2.0


def test_log_probs_in_half_precision_are_summed_in_float32():
    # The eight significant bits of bfloat16 cannot hold 999; they would round it to 1000.
    log_prob = torch.full((1, 999), -1.0, dtype=torch.bfloat16)
    masks = torch.ones(1, 999, dtype=torch.bool)
    for estimate in (elbo(log_prob, masks), trajectory_log_prob(log_prob, masks)):
        assert estimate.dtype == torch.float32
        assert estimate.item() == -999.0
