"""The four weight baselines against constants worked out by hand."""

import math

import pytest
import torch

from dmpo_lightning.functional import (
    group_baseline,
    importance_weights,
    negative_baseline,
    no_baseline,
    policy_baseline,
)

LOG3 = math.log(3)


def test_no_baseline_is_zero_and_group_baseline_is_the_mean_weight():
    reward = torch.tensor([[0.0, 1.0, 5.0]])
    assert no_baseline(reward).tolist() == [[0.0, 0.0, 0.0]]
    assert group_baseline(reward).tolist() == [[1.0, 1.0, 1.0]]


def test_negative_baseline_is_the_weights_of_the_opposite_reward():
    # alpha = 1, r = (0, log 3): w = 2 (1, 3) / 4; with -r the ratios are 1 and 1/3, so b = 2 (3, 1) / 4.
    log_rnd, reward = torch.zeros(1, 2), torch.tensor([[0.0, LOG3]])
    weights = importance_weights(log_rnd, reward, reward_temperature=1.0)
    baseline = negative_baseline(weights, log_rnd, reward, reward_temperature=1.0)
    torch.testing.assert_close(weights - baseline, torch.tensor([[-1.0, 1.0]]))


def test_negative_baseline_keeps_the_reference_and_turns_only_the_reward():
    # log_rnd = (0, log 2), r = (0, log 3): ratios with -r are 1 and 2/3, so b = 2 (3, 2) / 5.
    log_rnd, reward = torch.tensor([[0.0, math.log(2)]]), torch.tensor([[0.0, LOG3]])
    weights = importance_weights(log_rnd, reward, reward_temperature=1.0)
    baseline = negative_baseline(weights, log_rnd, reward, reward_temperature=1.0)
    torch.testing.assert_close(baseline, torch.tensor([[1.2, 0.8]]))


def test_negative_baseline_takes_the_same_step_as_the_weights():
    # c = 1/2 on r = (0, 2 log 3): ratios with -r are 1 and 1/3, so b = 2 (3, 1) / 4.
    log_rnd, reward = torch.zeros(1, 2), torch.tensor([[0.0, 2 * LOG3]])
    options = {"reward_temperature": 1.0, "proximal_coefficient": 0.5}
    weights = importance_weights(log_rnd, reward, **options)
    baseline = negative_baseline(weights, log_rnd, reward, **options)
    torch.testing.assert_close(baseline, torch.tensor([[1.5, 0.5]]))


@pytest.mark.parametrize("reward", [[0.3, 0.3, 0.3], [0.3, 0.3 + 5e-7, 0.3]])
def test_equal_rewards_leave_exactly_no_signal_under_negative(reward):
    log_rnd, reward = torch.tensor([[0.4, -2.0, 1.0]]), torch.tensor([reward])
    weights = importance_weights(log_rnd, reward, reward_temperature=1e-3)
    baseline = negative_baseline(weights, log_rnd, reward, reward_temperature=1e-3)
    assert torch.equal(weights - baseline, torch.zeros(1, 3))


def test_only_the_groups_of_equal_reward_lose_their_signal():
    log_rnd, reward = torch.zeros(2, 2), torch.tensor([[0.5, 0.5], [0.0, LOG3]])
    weights = importance_weights(log_rnd, reward, reward_temperature=1.0)
    baseline = negative_baseline(weights, log_rnd, reward, reward_temperature=1.0)
    torch.testing.assert_close(weights - baseline, torch.tensor([[0.0, 0.0], [-1.0, 1.0]]))


def test_policy_baseline_is_the_ratio_of_current_to_behaviour_policy():
    # Ratios 1/2 and 3/2: sum 2, so b is the ratios themselves.
    log_prob = torch.tensor([[math.log(0.1), math.log(0.3)]])
    behaviour = torch.tensor([[math.log(0.2), math.log(0.2)]])
    torch.testing.assert_close(policy_baseline(log_prob, behaviour), torch.tensor([[0.5, 1.5]]))


def test_policy_baseline_of_the_behaviour_policy_is_the_group_baseline():
    log_prob = torch.tensor([[-3.0, -1.0, -7.0]])
    torch.testing.assert_close(policy_baseline(log_prob, log_prob), group_baseline(log_prob))


def test_policy_baseline_cancels_the_weights_once_the_policy_is_the_target():
    behaviour, reference = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-2.0, -1.5, -1.0]])
    reward = torch.tensor([[0.0, 1.0, 0.5]])
    weights = importance_weights(reference - behaviour, reward, reward_temperature=0.5)
    baseline = policy_baseline(reference + reward / 0.5, behaviour)
    torch.testing.assert_close(weights, baseline)


def test_policy_baseline_is_detached():
    log_prob = torch.zeros(1, 2, requires_grad=True)
    assert not policy_baseline(log_prob, torch.zeros(1, 2)).requires_grad
