"""Importance weights, effective sample size and the proximal coefficient against constants worked out by hand."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from dmpo_lightning.functional import (
    effective_sample_size,
    equal_reward_groups,
    importance_weights,
    log_partition,
    negligible,
)

NO_LOG_RND = torch.zeros(1, 2)


def test_weights_are_the_density_ratio_with_mean_one():
    # exp(log 2 + 0) = 2 and exp(0 + 1 log 4) = 4 (alpha = 0.5, r = 0.5 log 4); sum 6, so w = 2 (2, 4) / 6.
    log_rnd = torch.tensor([[math.log(2), 0.0]])
    reward = torch.tensor([[0.0, 0.5 * math.log(4)]])
    weights = importance_weights(log_rnd, reward, reward_temperature=0.5)
    torch.testing.assert_close(weights, torch.tensor([[2 / 3, 4 / 3]]))


def test_proximal_coefficient_is_a_power_of_the_density_ratio():
    # Ratios 1 and 9, c = 1/2: 1 and 3, so w = 2 (1, 3) / 4.
    weights = importance_weights(
        torch.tensor([[0.0, math.log(9)]]), torch.zeros(1, 2), reward_temperature=1.0, proximal_coefficient=0.5
    )
    torch.testing.assert_close(weights, torch.tensor([[0.5, 1.5]]))


def test_groups_do_not_see_each_other():
    generator = torch.Generator().manual_seed(0)
    log_rnd, reward = torch.randn(2, 3, 5, generator=generator).unbind()
    together = importance_weights(log_rnd, reward, reward_temperature=0.3)
    alone = importance_weights(log_rnd[1:2], reward[1:2], reward_temperature=0.3)
    torch.testing.assert_close(together[1:2], alone)
    torch.testing.assert_close(together.mean(-1), torch.ones(3))


def test_a_constant_added_to_log_rnd_or_reward_changes_nothing():
    log_rnd, reward = torch.tensor([[0.1, -0.4, 2.0]]), torch.tensor([[1.0, 0.0, 0.5]])
    weights = importance_weights(log_rnd, reward, reward_temperature=0.3)
    torch.testing.assert_close(importance_weights(log_rnd + 7, reward - 3, reward_temperature=0.3), weights)


def test_weights_of_extreme_rewards_stay_finite():
    weights = importance_weights(NO_LOG_RND, torch.tensor([[0.0, 1.0]]), reward_temperature=1e-6)
    assert weights.tolist() == [[0.0, 2.0]]


def test_weights_are_float32_whatever_comes_in():
    half = torch.zeros(1, 2, dtype=torch.bfloat16)
    assert importance_weights(half, half, reward_temperature=1.0).dtype == torch.float32


def test_partition_functions_by_hand():
    # alpha = 1 / 2 and r = (0, 0.5 log 3): exp gives 1 and 3, of mean 2. Rewards of 1000 must not overflow.
    reward = torch.tensor([[0.0, 0.5 * math.log(3)], [1000.0, 1000.0]])
    expected = torch.tensor([math.log(2), 2000.0], dtype=torch.float64)
    torch.testing.assert_close(log_partition(reward, reward_temperature=0.5), expected, rtol=0, atol=1e-6)


def test_ess_is_one_for_uniform_weights():
    assert effective_sample_size(torch.ones(1, 4)).tolist() == [1.0]


def test_ess_is_one_over_the_group_size_when_one_rollout_carries_everything():
    assert effective_sample_size(torch.tensor([[0.0, 4.0, 0.0, 0.0]])).tolist() == [0.25]


def test_ess_by_hand():
    # (1 + 3)^2 / (2 (1 + 9)) = 16 / 20.
    torch.testing.assert_close(effective_sample_size(torch.tensor([[1.0, 3.0]])), torch.tensor([0.8]))


def test_rewards_within_a_millionth_are_equal():
    reward = torch.tensor([[0.3, 0.3, 0.3], [0.3, 0.3 + 5e-7, 0.3], [0.3, 0.3 + 3e-6, 0.3], [0.0, 1.0, 0.0]])
    assert equal_reward_groups(reward).tolist() == [True, True, False, False]


# Negligible rows ------------------------------------------------------------------------------------------------------


def test_the_rows_of_least_mass_up_to_the_tolerated_share_are_negligible():
    signal = torch.tensor([5.0, -0.02, 0.03, -4.9, 0.05, 0.0])
    assert negligible(signal, 0.0).tolist() == [False, False, False, False, False, True]
    assert negligible(signal, 0.0025).tolist() == [False, True, False, False, False, True]
    assert negligible(signal, 0.0055).tolist() == [False, True, True, False, False, True]
    assert negligible(signal, 0.4).tolist() == [False, True, True, False, True, True]
    assert negligible(signal, 0.505).tolist() == [False, True, True, True, True, True]


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=12), st.floats(0, 0.999))
def test_what_is_negligible_never_holds_more_than_the_share(values, tolerance):
    signal = torch.tensor(values)
    dropped = negligible(signal, tolerance)
    assert signal[dropped].abs().double().sum() <= tolerance * signal.abs().double().sum()
    assert dropped.all() == (signal == 0).all()
    assert dropped[signal == 0].all()
