"""What policy-gradient methods share, against numbers worked out by hand and sums over all maskings."""

import math

import pytest
import torch

from dmpo_lightning.functional import (
    centred_advantage,
    clipped_surrogate,
    complementary_elbo,
    complementary_masks,
    k2,
    k3,
    leave_one_out_advantage,
    z_score_advantage,
)

REWARD = torch.tensor([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]])


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        (centred_advantage, [0.0, -1.0, -1.0, 2.0]),
        (leave_one_out_advantage, [0.0, -4 / 3, -4 / 3, 8 / 3]),
        # The variance is 6 / 3 with a rollout less, and 6 / 4.
        (z_score_advantage, [0.0, -1 / math.sqrt(2), -1 / math.sqrt(2), math.sqrt(2)]),
        (lambda r: z_score_advantage(r, correction=0), [0.0, -1 / math.sqrt(1.5), -1 / math.sqrt(1.5), 2 / 1.5**0.5]),
    ],
)
def test_advantages_are_zero_in_groups_of_equal_reward(advantage, expected):
    torch.testing.assert_close(advantage(REWARD), torch.tensor([expected, [0.0] * 4]))


def test_the_surrogate_stops_where_the_ratio_has_moved_far_enough_in_the_direction_of_the_advantage():
    log_ratio = torch.tensor([0.5, 1.5, 0.5, 1.5, 1.0]).log().requires_grad_()
    advantage = torch.tensor([2.0, 2.0, -2.0, -2.0, 3.0])
    value = clipped_surrogate(log_ratio, advantage, 0.2)
    torch.testing.assert_close(value.detach(), torch.tensor([1.0, 2.4, -1.6, -3.0, 3.0]))
    # rho A where it is not clipped.
    torch.testing.assert_close(torch.autograd.grad(value.sum(), log_ratio)[0], torch.tensor([1.0, 0.0, 0.0, -3.0, 3.0]))


def test_k2_and_k3_are_zero_at_the_reference_and_rise_on_both_sides():
    log_ratio = torch.tensor([0.0, 1.0, -1.0])
    torch.testing.assert_close(k2(log_ratio), torch.tensor([0.0, 0.5, 0.5]))
    torch.testing.assert_close(k3(log_ratio), torch.tensor([0.0, math.exp(-1), math.e - 2]))


def test_complementary_masks_have_every_count_and_share_no_position():
    counted = torch.tensor([True, True, False, True]).expand(4000, -1)
    masks = complementary_masks(torch.arange(4000), counted, pairs=1)[:, 0]
    assert torch.equal(masks.sum(1), counted.long())
    count = masks[:, 0].sum(-1)
    torch.testing.assert_close(count.bincount() / 4000, torch.full((4,), 0.25), atol=0.03, rtol=0)
    torch.testing.assert_close(
        masks[count == 1, 0].float().mean(0), torch.tensor([1.0, 1.0, 0.0, 1.0]) / 3, atol=0.06, rtol=0
    )


def test_the_complementary_elbo_by_hand_and_with_an_empty_mask():
    masks = torch.tensor([[[True, False, False], [False, True, True]], [[True] * 3, [False] * 3]])[None]
    log_prob = torch.tensor([-1.0, -2.0, -4.0]).expand(1, 2, 2, 3)
    # n = 3: (4 / 2) (-1) + (4 / 4) (-6) of the first pair, (4 / 6) (-7) of the second.
    torch.testing.assert_close(complementary_elbo(log_prob, masks), torch.tensor([(-8 - 14 / 3) / 2]))
