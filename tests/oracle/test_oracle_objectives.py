"""The shipped objectives, samplers and rollouts, unchanged, on a tabular policy behind the real `Policy`."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dmpo_lightning.functional import row_keys
from dmpo_lightning.objectives import WDCE, WDDO, ElboEstimator, Objective, TrajectoryEstimator
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.rewards.scores import Scores
from dmpo_lightning.rollout import Rollouts, Sampling, collect
from dmpo_lightning.samplers import ConfidenceSampler, RandomOrderSampler, Sampler
from oracle.tabular import (
    PAIR_COMPLETIONS,
    PAIR_REVEAL_STEPS,
    conditionals,
    exact_elbo,
    pair_log_prob,
    random_tables,
    sequence_log_prob,
    sequential_log_prob,
    total_variation,
)
from oracle.tabular_model import prompts, tabular_policy, tabular_reward

ALPHA = 0.5
REWARD = torch.tensor([0.0, 0.3, 0.1, 1.0, 0.2, 0.6, 0.4, 0.8])
ONE_RIGHT = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
BEST = 3
REFERENCE = random_tables(0).float()
TARGET = (sequence_log_prob(REFERENCE) + REWARD / ALPHA).softmax(-1)
ELBO_TARGET = (exact_elbo(REFERENCE) + REWARD / ALPHA).softmax(-1)


def every_pair(reward: Tensor) -> Rollouts:
    """All pairs of order and completion once each: exactly the population of a uniform behaviour policy."""
    return Rollouts(
        prompts=prompts(1),
        completion_ids=PAIR_COMPLETIONS[None],
        keys=row_keys(0, torch.arange(1), group_size=48, buffer=0),
        reveal_step=PAIR_REVEAL_STEPS[None],
        sampled_log_prob=torch.full((1, 48, 3), math.log(0.5)),
        scores=Scores({}, reward.repeat(6)[None], failures=0),
        order_is_independent=True,
        temperature=1.0,
    )


def prepare(objective: Objective, policy: Policy, rollouts: Rollouts) -> dict[str, Tensor]:
    with evaluating(policy):
        return objective.prepare(policy, rollouts, rows_per_forward=1024)[0]


def update(
    objective: Objective, policy: Policy, rollouts: Rollouts, optimizer: torch.optim.Optimizer, *, iterations: int
) -> None:
    """Full-buffer steps, each with fresh masks, as the module takes them."""
    targets = prepare(objective, policy, rollouts)
    for iteration in range(iterations):
        with evaluating(policy):
            objective.before_step(policy, rollouts, targets, slice(None), rows_per_forward=1024)
        flat = {name: value.flatten(0, 1) for name, value in targets.items()}
        loss, _ = objective.loss(policy, rollouts.rows(), flat, iteration=iteration, planned_rollouts=len(rollouts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def trained_on_policy(
    objective: Objective,
    reward: Tensor,
    *,
    batch: int,
    group_size: int,
    buffers: int,
    iterations: int,
    sampler: Sampler | None = None,
    log_prob: Callable[[Tensor], Tensor] = sequence_log_prob,
) -> Tensor:
    """The sequence distribution after training from the reference on its own samples, in random orders by default.

    ``log_prob`` is that of the completions which ``sampler`` draws from a table.
    """
    sampler = sampler or RandomOrderSampler()
    policy = tabular_policy(REFERENCE, REFERENCE)
    optimizer = torch.optim.Adam([policy.model.table], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, buffers)
    for buffer in range(buffers):
        sampling = Sampling(sampler, 3, group_size, buffer=buffer)
        rollouts = collect(policy, tabular_reward(reward), prompts(batch), sampling)
        update(objective, policy, rollouts, optimizer, iterations=iterations)
        schedule.step()
    return log_prob(policy.model.table.detach()).exp()


def test_weights_of_the_whole_population_are_the_target_over_the_behaviour_policy():
    policy = tabular_policy(torch.zeros_like(REFERENCE), REFERENCE)
    objective = WDCE(reward_temperature=ALPHA, baseline="none", estimator=TrajectoryEstimator())
    weights = prepare(objective, policy, every_pair(REWARD))["weight"]
    joint = (pair_log_prob(REFERENCE) + REWARD.repeat(6) / ALPHA).softmax(-1)
    torch.testing.assert_close(weights[0] / 48, joint)
    torch.testing.assert_close(weights.view(6, 8).sum(0) / 48, TARGET)


@pytest.mark.parametrize("block_length", [None, 1])
def test_recorded_log_probs_of_the_sampler_equal_replaying_its_orders(block_length):
    policy = tabular_policy(random_tables(4).float(), REFERENCE)
    sampling = Sampling(RandomOrderSampler(temperature=0.7, block_length=block_length), 3, 16, seed=1)
    rollouts = collect(policy, tabular_reward(REWARD), prompts(2), sampling)
    replayed = TrajectoryEstimator().log_prob(policy, rollouts, rows_per_forward=5)
    torch.testing.assert_close(replayed, rollouts.sampled_log_prob.sum(-1))


@pytest.mark.parametrize(
    ("baseline", "iterations"),
    [
        pytest.param("none", 4, marks=pytest.mark.slow),
        ("group", 1),
        pytest.param("policy", 2, marks=pytest.mark.slow),
    ],
)
def test_wdce_with_trajectory_log_rnd_reaches_the_target(baseline, iterations):
    objective = WDCE(
        reward_temperature=ALPHA,
        baseline=baseline,
        negative_term="log_likelihood",
        replicates=8,
        estimator=TrajectoryEstimator(),
    )
    reached = trained_on_policy(objective, REWARD, batch=1, group_size=512, buffers=100, iterations=iterations)
    assert total_variation(reached, TARGET) < 0.05


@pytest.mark.slow
def test_wdce_with_trajectory_log_rnd_from_left_to_right_reaches_the_target_of_that_order():
    """In the order in which block-causal models with blocks of one token decode."""
    objective = WDCE(
        reward_temperature=ALPHA, uninformative_groups="train", replicates=8, estimator=TrajectoryEstimator()
    )
    sequential = ConfidenceSampler(remasking="sequential")
    options = {"batch": 1, "group_size": 512, "buffers": 100, "iterations": 1}
    reached = trained_on_policy(objective, REWARD, **options, sampler=sequential, log_prob=sequential_log_prob)
    target = (sequential_log_prob(REFERENCE) + REWARD / ALPHA).softmax(-1)
    assert total_variation(reached, target) < 0.05
    # Of this reference the other orders have another target, which is further away.
    assert total_variation(target, TARGET) > 0.02
    assert total_variation(sequential_log_prob(REFERENCE).exp(), target) > 0.1


def test_policy_baseline_is_refreshed_so_that_it_cancels_the_weights_once_the_policy_is_the_target():
    reference = conditionals(sequence_log_prob(REFERENCE).exp())
    target = conditionals((sequence_log_prob(reference) + REWARD / ALPHA).softmax(-1))
    policy, rollouts = tabular_policy(torch.zeros_like(reference), reference), every_pair(REWARD)
    objective = WDCE(reward_temperature=ALPHA, baseline="policy", estimator=TrajectoryEstimator())
    targets = prepare(objective, policy, rollouts)
    torch.testing.assert_close(targets["signal"], targets["weight"] - 1)
    policy.model.table.data.copy_(target)
    with evaluating(policy):
        objective.before_step(policy, rollouts, targets, slice(None), rows_per_forward=1024)
    torch.testing.assert_close(targets["signal"], torch.zeros(1, 48), rtol=0, atol=1e-5)


def test_wddo_of_the_behaviour_policy_itself_is_exact_whatever_the_masks():
    policy, rollouts = tabular_policy(random_tables(4).float(), REFERENCE), every_pair(REWARD)
    objective = WDDO(reward_temperature=ALPHA, replicates=2)
    targets = {name: value.flatten(0, 1) for name, value in prepare(objective, policy, rollouts).items()}
    loss, _ = objective.loss(policy, rollouts.rows(), targets, iteration=0, planned_rollouts=48)
    # D = 0 in every row: the mean of (w + 1) log 2 over weights of mean 1, times 2 / L.
    assert loss.item() == pytest.approx(2 * math.log(2) * 2 / 3)


@pytest.mark.slow
def test_wdce_with_elbo_log_rnd_and_no_baseline_reaches_the_tilted_elbo():
    objective = WDCE(reward_temperature=ALPHA, baseline="none", replicates=8, estimator=ElboEstimator(32))
    reached = trained_on_policy(objective, REWARD, batch=1, group_size=512, buffers=80, iterations=4)
    assert total_variation(reached, ELBO_TARGET) < 0.05


@pytest.mark.slow
def test_wddo_with_trajectory_log_rnd_reaches_the_target():
    objective = WDDO(reward_temperature=ALPHA, replicates=16, estimator=TrajectoryEstimator())
    reached = trained_on_policy(objective, REWARD, batch=1, group_size=512, buffers=100, iterations=2)
    assert total_variation(reached, TARGET) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("negative_term", ["log_likelihood", "likelihood"])
def test_negative_with_small_groups_puts_its_mass_on_the_one_right_completion(negative_term):
    objective = WDCE(
        reward_temperature=ALPHA, baseline="negative", negative_term=negative_term, estimator=TrajectoryEstimator()
    )
    reached = trained_on_policy(objective, ONE_RIGHT, batch=8, group_size=4, buffers=300, iterations=1)
    assert reached[BEST] > 0.95


def test_groups_of_equal_reward_leave_the_policy_exactly_as_it_is():
    policy = tabular_policy(random_tables(4).float(), REFERENCE)
    before = policy.model.table.detach().clone()
    optimizer = torch.optim.SGD([policy.model.table], lr=1e3)
    update(WDCE(reward_temperature=ALPHA), policy, every_pair(torch.full((8,), 0.3)), optimizer, iterations=2)
    assert torch.equal(policy.model.table, before)


def test_reference_of_the_policy_does_not_move_with_training():
    policy = tabular_policy(torch.zeros_like(REFERENCE), REFERENCE)
    optimizer = torch.optim.SGD([policy.model.table], lr=1.0)
    update(WDCE(reward_temperature=ALPHA), policy, every_pair(REWARD), optimizer, iterations=2)
    assert not torch.equal(policy.model.table, torch.zeros_like(REFERENCE))
    assert torch.equal(policy.reference.model.table, REFERENCE)
