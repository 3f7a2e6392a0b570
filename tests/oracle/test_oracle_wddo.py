"""WDDO with exact log-probs: a bounded loss whose minimiser is the target, whatever the behaviour policy."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dmpo_lightning.functional import importance_weights, wddo_loss
from oracle.tabular import conditionals, exact_elbo, random_tables, sequence_log_prob, total_variation, train

ALPHA = 0.5
REWARD = torch.tensor([0.0, 0.3, 0.1, 1.0, 0.2, 0.6, 0.4, 0.8])
REFERENCE, BEHAVIOUR = random_tables(0), random_tables(1)
CONSISTENT_BEHAVIOUR = conditionals(sequence_log_prob(BEHAVIOUR).exp().double())
TARGET = (sequence_log_prob(REFERENCE) + REWARD / ALPHA).softmax(-1)


def population_wddo(
    table: Tensor, behaviour: Tensor = BEHAVIOUR, log_prob: Callable[[Tensor], Tensor] = sequence_log_prob
) -> Tensor:
    """The expectation of the loss over completions of the behaviour policy, with the weights of an infinite group."""
    log_density = sequence_log_prob(behaviour)
    log_rnd = sequence_log_prob(REFERENCE) - log_density
    # Log density added to the log-weight makes the softmax density times weight; see `population_signal`.
    members = importance_weights((log_rnd + log_density)[None], REWARD[None], reward_temperature=ALPHA)[0]
    weights = members / (len(REWARD) * log_density.exp())
    log_ratio = log_prob(table) - log_prob(behaviour)
    terms = [
        wddo_loss(ratio[None], weight[None], length=3, beta=1.0, planned_rollouts=1)
        for ratio, weight in zip(log_ratio, weights, strict=True)
    ]
    return log_density.exp() @ torch.stack(terms)


def test_wddo_is_minimised_by_the_target():
    table = train(BEHAVIOUR, lambda table, _: population_wddo(table), steps=250)
    assert total_variation(sequence_log_prob(BEHAVIOUR).exp(), TARGET) > 0.15
    assert total_variation(sequence_log_prob(table).exp(), TARGET) < 0.002


def test_wddo_with_elbos_is_minimised_by_the_target_where_those_of_the_behaviour_policy_are_exact():
    loss = partial(population_wddo, behaviour=CONSISTENT_BEHAVIOUR, log_prob=exact_elbo)
    table = train(REFERENCE, lambda table, _: loss(table), steps=250)
    assert total_variation(sequence_log_prob(table).exp(), TARGET) < 0.002


def test_wddo_is_smallest_at_the_target_and_stays_positive_far_away():
    at_target = population_wddo(conditionals(TARGET.double()))
    far = [population_wddo(scale * random_tables(seed)) for seed in range(5) for scale in (0.1, 1.0, 10.0)]
    assert min(far) > at_target > 0
