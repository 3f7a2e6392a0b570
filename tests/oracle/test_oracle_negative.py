"""The negative baseline: a constant push at the all-masked context, and exactly nothing for equal rewards."""

import pytest
import torch
from torch import Tensor

from oracle.tabular import (
    ALL_MASKED,
    COMPLETIONS,
    MATCHES,
    PAIR_COMPLETIONS,
    Elbos,
    Trajectories,
    conditionals,
    population_loss,
    population_signal,
    random_tables,
    sequence_log_prob,
    total_variation,
    train,
)

ALPHA = 0.5
REWARD = torch.tensor([0.0, 0.3, 0.1, 1.0, 0.2, 0.6, 0.4, 0.8])
ONE_RIGHT = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
BEST = 3
REFERENCE = random_tables(0)
# m = 3 of 3 positions: this context is drawn with probability 1/3, and each of its tokens has weight 1/m = 1/3.
CONTEXT_WEIGHT = 1 / 9


def tilted(reward: Tensor) -> Tensor:
    return (sequence_log_prob(REFERENCE) + reward / ALPHA).softmax(-1)


def token_marginals(probabilities: Tensor) -> Tensor:
    """``[position value]`` from ``[completion]``."""
    return (probabilities * MATCHES[ALL_MASKED]).sum(-1)


def trajectory_signal(baseline: str, table: Tensor, behaviour: Tensor, reward: Tensor = REWARD) -> Tensor:
    return population_signal(
        baseline,
        Trajectories,
        table=table[None],
        behaviour=behaviour[None],
        reference=REFERENCE[None],
        reward=reward.repeat(6)[None],
        temperature=ALPHA,
    )


def all_masked_gradient(table: Tensor, signal: Tensor) -> Tensor:
    table = table.clone().requires_grad_()
    population_loss(table[None], PAIR_COMPLETIONS, signal).backward()
    return table.grad[ALL_MASKED].float()


@pytest.mark.parametrize("table", [REFERENCE, random_tables(5), 10 * random_tables(6)])
@pytest.mark.parametrize("behaviour", [REFERENCE, random_tables(7)])
def test_negative_gradient_at_the_all_masked_context_is_the_same_constant_for_every_policy(table, behaviour):
    constant = -CONTEXT_WEIGHT * token_marginals(tilted(REWARD) - tilted(-REWARD))
    gradient = all_masked_gradient(table, trajectory_signal("negative", table, behaviour))
    torch.testing.assert_close(gradient, constant, rtol=0, atol=1e-6)
    assert constant.abs().amax() > 0.02


def test_group_gradient_at_the_all_masked_context_compares_the_target_with_the_behaviour_policy():
    behaviour = random_tables(7)
    constant = -CONTEXT_WEIGHT * token_marginals(tilted(REWARD) - sequence_log_prob(behaviour).exp())
    gradient = all_masked_gradient(random_tables(5), trajectory_signal("group", random_tables(5), behaviour))
    torch.testing.assert_close(gradient, constant, rtol=0, atol=1e-6)


@pytest.mark.parametrize("baseline", ["negative", "group"])
def test_negative_and_group_losses_fall_without_bound_on_one_fixed_buffer(baseline):
    signal = trajectory_signal(baseline, REFERENCE, behaviour=REFERENCE)
    downhill = torch.zeros_like(REFERENCE)
    downhill[ALL_MASKED] = -all_masked_gradient(REFERENCE, signal)
    slope = downhill.square().sum()
    near, far = (population_loss((REFERENCE + step * downhill)[None], PAIR_COMPLETIONS, signal) for step in (1e3, 1e6))
    torch.testing.assert_close(far - near, -(1e6 - 1e3) * slope, rtol=1e-3, atol=0)


def test_policy_baseline_has_no_such_push_once_the_policy_is_the_target():
    target = conditionals(tilted(REWARD).double())
    gradient = all_masked_gradient(target, trajectory_signal("policy", target, behaviour=random_tables(7)))
    torch.testing.assert_close(gradient, torch.zeros(3, 2), rtol=0, atol=1e-6)


def test_negative_passes_the_target_on_its_way_to_the_one_right_completion():
    snapshots = []

    def loss(table: Tensor, step: int) -> Tensor:
        if step % 100 == 0:
            snapshots.append(table.detach().clone())
        signal = trajectory_signal("negative", table.detach(), behaviour=table.detach(), reward=ONE_RIGHT)
        return population_loss(table[None], PAIR_COMPLETIONS, signal)

    snapshots.append(train(REFERENCE, loss, steps=500, learning_rate=0.02))
    log_probs = sequence_log_prob(torch.stack(snapshots))
    mass = log_probs.exp()[:, BEST]
    divergence = (log_probs.exp() * (log_probs - sequence_log_prob(REFERENCE))).sum(-1)
    assert (divergence.diff() > 0).all()
    assert (mass.diff() > 0).all()
    assert mass[-1] > 0.95
    assert total_variation(log_probs[-1].exp(), tilted(ONE_RIGHT)) > 0.5


@pytest.mark.parametrize("estimate", [Trajectories, Elbos])
def test_equal_rewards_give_exactly_no_gradient(estimate):
    table = random_tables(5)[None].requires_grad_()
    signal = population_signal(
        "negative",
        estimate,
        table=table,
        behaviour=random_tables(7)[None],
        reference=REFERENCE[None],
        reward=torch.full((1, len(estimate.completions)), 0.7),
        temperature=ALPHA,
    )
    population_loss(table, estimate.completions, signal).backward()
    assert torch.equal(signal, torch.zeros_like(signal))
    assert torch.equal(table.grad, torch.zeros_like(table))


def test_completions_are_enumerated_so_that_the_best_is_0_1_1():
    assert COMPLETIONS[BEST].tolist() == [0, 1, 1]
