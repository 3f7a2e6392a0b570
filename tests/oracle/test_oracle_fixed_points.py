"""Where the population gradient leads: ``p_ref exp(r / alpha) / Z``, or what theory says instead."""

import pytest
import torch
from torch import Tensor

from oracle.tabular import (
    Elbos,
    Estimate,
    Sequential,
    Trajectories,
    conditionals,
    exact_elbo,
    population_loss,
    population_signal,
    random_tables,
    sequence_log_prob,
    sequential_log_prob,
    stationarity_residual,
    total_variation,
    train,
)

ALPHA, STEPS = 0.5, 400
REWARD = torch.tensor([0.0, 0.3, 0.1, 1.0, 0.2, 0.6, 0.4, 0.8])
INCONSISTENT = random_tables(0)
CONSISTENT = conditionals(sequence_log_prob(random_tables(1)).exp().double())
REFERENCES = torch.stack((CONSISTENT, INCONSISTENT))
TARGETS = (sequence_log_prob(REFERENCES) + REWARD / ALPHA).softmax(-1)
ELBO_TARGETS = (exact_elbo(REFERENCES) + REWARD / ALPHA).softmax(-1)


def trained(baseline: str, estimate: Estimate, *, steps_per_buffer: int) -> Tensor:
    """Both problems, from p_ref on, the behaviour policy refreshed every ``steps_per_buffer`` steps."""
    behaviour = REFERENCES.clone()
    reward = REWARD.repeat(len(estimate.completions) // len(REWARD)).expand(len(REFERENCES), -1)

    def loss(table: Tensor, step: int) -> Tensor:
        if step % steps_per_buffer == 0:
            behaviour.copy_(table.detach())
        signal = population_signal(
            baseline, estimate, table=table, behaviour=behaviour, reference=REFERENCES, reward=reward, temperature=ALPHA
        )
        return population_loss(table, estimate.completions, signal)

    return train(REFERENCES, loss, steps=STEPS)


def test_problem_is_not_solved_at_the_start():
    assert (total_variation(sequence_log_prob(REFERENCES).exp(), TARGETS) > 0.15).all()


@pytest.mark.parametrize(
    ("baseline", "steps_per_buffer"), [("none", 1), ("none", STEPS), ("group", 1), ("policy", 10), ("policy", STEPS)]
)
def test_exact_log_rnd_reaches_the_target_from_consistent_and_inconsistent_references(baseline, steps_per_buffer):
    table = trained(baseline, Trajectories, steps_per_buffer=steps_per_buffer)
    assert (total_variation(sequence_log_prob(table).exp(), TARGETS) < 0.002).all()


@pytest.mark.parametrize(("baseline", "steps_per_buffer"), [("group", 1), ("policy", STEPS)])
def test_rollouts_from_left_to_right_with_their_exact_log_rnd_reach_the_target_of_that_order(
    baseline, steps_per_buffer
):
    """As `remasking: sequential` samples, and a block-causal model with blocks of one token."""
    targets = (sequential_log_prob(REFERENCES) + REWARD / ALPHA).softmax(-1)
    table = trained(baseline, Sequential, steps_per_buffer=steps_per_buffer)
    assert (total_variation(sequential_log_prob(REFERENCES).exp(), targets) > 0.15).all()
    assert (total_variation(sequential_log_prob(table).exp(), targets) < 0.002).all()
    # Of an inconsistent reference the other orders have another target.
    assert total_variation(targets, TARGETS)[1] > 0.02


def test_elbo_log_rnd_without_baseline_reaches_the_tilted_elbo_of_the_reference():
    table = trained("none", Elbos, steps_per_buffer=1)
    assert (total_variation(sequence_log_prob(table).exp(), ELBO_TARGETS) < 0.002).all()


def test_tilted_elbo_is_the_target_for_a_consistent_reference_and_not_for_an_inconsistent_one():
    consistent, inconsistent = total_variation(ELBO_TARGETS, TARGETS)
    assert consistent < 1e-6
    assert inconsistent > 0.1


@pytest.mark.parametrize(("baseline", "steps_per_buffer"), [("group", 1), ("policy", 10)])
def test_elbo_log_rnd_with_a_unit_or_policy_baseline_is_stationary_beside_the_target(baseline, steps_per_buffer):
    table = trained(baseline, Elbos, steps_per_buffer=steps_per_buffer)
    assert stationarity_residual(REFERENCES, elbo_aim(REFERENCES)).abs().amax() > 0.05
    assert stationarity_residual(table, elbo_aim(table)).abs().amax() < 1e-4
    beside = total_variation(sequence_log_prob(table).exp(), TARGETS)
    assert ((beside > 0.006) & (beside < 0.15)).all()


def elbo_aim(table: Tensor) -> Tensor:
    """What weights from ELBOs aim at on-policy: ``p_theta exp(ELBO_ref - ELBO_theta + r / alpha) / Z``."""
    return (sequence_log_prob(table) + exact_elbo(REFERENCES) - exact_elbo(table) + REWARD / ALPHA).softmax(-1)
