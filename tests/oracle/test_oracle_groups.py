"""What small groups pull a policy to, by enumeration of all groups that can be drawn.

The policy is a softmax over 8 completions, whose own log-probs are learnt, so that no masking stands between. What
matters is the mean signal of each completion over all groups of G: where it is proportional to the policy, the
policy is stationary.
"""

import math
from itertools import combinations_with_replacement

import pytest
import torch
from torch import Tensor

from dmpo_lightning.functional import equal_reward_groups, importance_weights, log_partition
from oracle.tabular import total_variation

ALPHA = 0.5


def problem() -> tuple[Tensor, Tensor]:
    """A reference and graded rewards."""
    generator = torch.Generator().manual_seed(1000)
    reference = torch.rand(8, dtype=torch.float64, generator=generator).softmax(0)
    return reference, torch.rand(8, dtype=torch.float64, generator=generator)


REFERENCE, GRADED = problem()
BINARY = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1], dtype=torch.float64)


def target(reward: Tensor) -> Tensor:
    return (REFERENCE.log() + reward / ALPHA).softmax(0)


def pulled_to(
    policy: Tensor, group_size: int, reward: Tensor, *, prompt_weight: str, renewed: bool = False, skip: bool = False
) -> Tensor:
    """The distribution of the mean signal w of each completion, over all groups that ``policy`` draws.

    ``renewed`` takes the policy for its own reference. The buffer holds infinitely many such prompts. ``skip`` leaves
    groups of equal rewards out.
    """
    groups = torch.tensor(list(combinations_with_replacement(range(8), group_size)))
    counts = torch.nn.functional.one_hot(groups, 8).sum(1).double()
    chance = math.factorial(group_size) * ((policy.log() * counts).sum(1) - (counts + 1).lgamma().sum(1)).exp()
    log_rnd = torch.zeros(8, dtype=torch.float64) if renewed else REFERENCE.log() - policy.log()
    weights = importance_weights(log_rnd[groups].float(), reward[groups].float(), reward_temperature=ALPHA).double()
    if prompt_weight == "reward":
        own = log_partition(reward[groups], reward_temperature=ALPHA).exp()
        weights = weights * (own / (policy * (reward / ALPHA).exp()).sum())[:, None]
    if skip:
        weights = weights * ~equal_reward_groups(reward[groups])[:, None]
    pull = torch.zeros(8, dtype=torch.float64).index_add(0, groups.flatten(), (chance[:, None] * weights).flatten())
    return pull / pull.sum()


def fixed_point(group_size: int, prompt_weight: str) -> Tensor:
    policy = target(GRADED)
    for _ in range(40):
        policy = pulled_to(policy, group_size, GRADED, prompt_weight=prompt_weight)
    return policy


@pytest.mark.parametrize("group_size", [2, 4])
def test_prompts_that_count_alike_leave_the_target_where_it_is(group_size):
    star = target(GRADED)
    pull = pulled_to(star, group_size, GRADED, prompt_weight="equal")
    torch.testing.assert_close(pull, star, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("group_size", "left"), [(2, 0.207), (4, 0.065), (6, 0.040)])
def test_with_a_fixed_reference_prompts_that_count_by_reward_move_the_minimum(group_size, left):
    """The factor goes with the group that was drawn, which has its rollouts weighed by their reward twice."""
    star = target(GRADED)
    assert total_variation(REFERENCE, star).item() == pytest.approx(0.219, abs=5e-4)
    assert total_variation(fixed_point(group_size, "reward"), star).item() == pytest.approx(left, abs=5e-4)


@pytest.mark.parametrize(("group_size", "short"), [(2, 0.125), (4, 0.067), (6, 0.045)])
def test_with_a_renewed_reference_prompts_that_count_by_reward_aim_at_the_target_itself(group_size, short):
    star = target(GRADED)
    aims = {
        weight: pulled_to(REFERENCE, group_size, GRADED, prompt_weight=weight, renewed=True)
        for weight in ("equal", "reward")
    }
    assert total_variation(aims["reward"], star).item() == pytest.approx(0, abs=1e-6)
    assert total_variation(aims["equal"], star).item() == pytest.approx(short, abs=5e-4)


@pytest.mark.parametrize(
    ("reward", "beside"),
    [(GRADED, {2: 0.034, 4: 0.003, 6: 0.000}), (BINARY, {2: 0.322, 4: 0.148, 6: 0.079})],
    ids=["graded", "binary"],
)
def test_without_a_baseline_skipping_groups_of_equal_rewards_leads_beside_the_target(reward, beside):
    """What is left over-represents rare rewards, less so in larger groups. With b = 1 all signals are 0 there."""
    star = target(reward)
    for group_size, distance in beside.items():
        pull = pulled_to(star, group_size, reward, prompt_weight="equal", skip=True)
        assert total_variation(pull, star).item() == pytest.approx(distance, abs=5e-4)
