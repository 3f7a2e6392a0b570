"""The oracle itself, and the real sampler against it."""

import torch
from scipy.stats import chisquare

from dmpo_lightning.rollout import Sampling, sample_completions
from dmpo_lightning.samplers import RandomOrderSampler
from oracle.tabular import (
    COMPLETIONS,
    conditionals,
    context_index,
    exact_elbo,
    pair_log_prob,
    random_tables,
    sequence_log_prob,
)
from oracle.tabular_model import prompts, tabular_policy


def test_sequence_probabilities_sum_to_one():
    torch.testing.assert_close(sequence_log_prob(random_tables(0, 3)).exp().sum(-1), torch.ones(3))


def test_conditionals_of_a_distribution_return_it_in_every_order_and_make_the_elbo_exact():
    joint = random_tables(1).flatten()[:8].softmax(-1).float()
    table = conditionals(joint)
    torch.testing.assert_close(pair_log_prob(table).view(6, 8), joint.log().expand(6, 8), rtol=0, atol=1e-5)
    torch.testing.assert_close(exact_elbo(table), joint.log(), rtol=0, atol=1e-5)


def test_elbo_of_an_inconsistent_policy_is_below_its_log_prob_and_is_the_mean_over_orders():
    table = random_tables(2)
    torch.testing.assert_close(exact_elbo(table), pair_log_prob(table).view(6, 8).mean(0), rtol=0, atol=1e-5)
    assert (exact_elbo(table) < sequence_log_prob(table)).all()


def test_random_order_sampler_draws_from_the_enumerated_distribution():
    table, group_size = random_tables(3), 20_000
    sampling = Sampling(RandomOrderSampler(), 3, group_size)
    samples, _ = sample_completions(tabular_policy(table, table), prompts(1), sampling)
    place = {int(index): number for number, index in enumerate(context_index(COMPLETIONS))}
    drawn = torch.tensor([place[int(index)] for index in context_index(samples.completion_ids)])
    expected = sequence_log_prob(table).exp().double()
    assert chisquare(torch.bincount(drawn, minlength=8), expected / expected.sum() * group_size).pvalue > 0.01
