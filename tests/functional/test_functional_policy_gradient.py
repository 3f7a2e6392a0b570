"""What policy-gradient methods share, against numbers worked out by hand and sums over all maskings."""

import math

import pytest
import torch

from dmpo_lightning import functional as F

REWARD = torch.tensor([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]])


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        (F.centred_advantage, [0.0, -1.0, -1.0, 2.0]),
        (F.leave_one_out_advantage, [0.0, -4 / 3, -4 / 3, 8 / 3]),
        # The variance is 6 / 3 with a rollout less, and 6 / 4.
        (F.z_score_advantage, [0.0, -1 / math.sqrt(2), -1 / math.sqrt(2), math.sqrt(2)]),
        (lambda r: F.z_score_advantage(r, correction=0), [0.0, -1 / math.sqrt(1.5), -1 / math.sqrt(1.5), 2 / 1.5**0.5]),
    ],
)
def test_advantages_are_zero_in_groups_of_equal_reward(advantage, expected):
    torch.testing.assert_close(advantage(REWARD), torch.tensor([expected, [0.0] * 4]))


def test_the_surrogate_stops_where_the_ratio_has_moved_far_enough_in_the_direction_of_the_advantage():
    log_ratio = torch.tensor([0.5, 1.5, 0.5, 1.5, 1.0]).log().requires_grad_()
    advantage = torch.tensor([2.0, 2.0, -2.0, -2.0, 3.0])
    value = F.clipped_surrogate(log_ratio.exp(), advantage, 0.2)
    torch.testing.assert_close(value.detach(), torch.tensor([1.0, 2.4, -1.6, -3.0, 3.0]))
    gradient = torch.autograd.grad(value.sum(), log_ratio)[0]
    torch.testing.assert_close(gradient, torch.tensor([1.0, 0.0, 0.0, -3.0, 3.0]))


def test_k2_and_k3_are_zero_at_the_reference_and_rise_on_both_sides():
    log_ratio = torch.tensor([0.0, 1.0, -1.0])
    torch.testing.assert_close(F.k2(log_ratio), torch.tensor([0.0, 0.5, 0.5]))
    torch.testing.assert_close(F.k3(log_ratio), torch.tensor([0.0, math.exp(-1), math.e - 2]))


def test_complementary_masks_have_every_count_and_share_no_position():
    counted = torch.tensor([True, True, False, True]).expand(4000, -1)
    first, second = F.complementary_masks(torch.arange(4000), counted, pairs=1)[:, 0].unbind(1)
    assert torch.equal(first.long() + second.long(), counted.long())
    share = first.sum(-1).bincount() / 4000
    torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.03, rtol=0)


def test_the_complementary_elbo_by_hand_and_with_an_empty_mask():
    masks = torch.tensor([[[True, False, False], [False, True, True]], [[True] * 3, [False] * 3]])[None]
    log_prob = torch.tensor([-1.0, -2.0, -4.0]).expand(1, 2, 2, 3)
    # n = 3: (4 / 2) (-1) + (4 / 4) (-6) of the first pair, (4 / 6) (-7) of the second.
    torch.testing.assert_close(F.complementary_elbo(log_prob, masks), torch.tensor([(-8 - 14 / 3) / 2]))


def test_a_mask_of_each_node_and_the_quadrature_by_hand():
    counted = torch.ones(1, 10, dtype=torch.bool)
    masks = F.quadrature_masks(torch.tensor([3]), counted)
    assert masks.sum(-1).tolist() == [[1, 5, 8]]  # of 1.13, 5 and 8.87
    log_prob = torch.full((1, 3, 10), -1.0)
    nodes = [0.5 - math.sqrt(0.15), 0.5, 0.5 + math.sqrt(0.15)]
    expected = -(5 / 18 * 1 / nodes[0] + 8 / 18 * 5 / nodes[1] + 5 / 18 * 8 / nodes[2])
    torch.testing.assert_close(F.quadrature_elbo(log_prob, masks), torch.tensor([expected]))


def test_the_upper_bound_by_hand_and_its_gradient_where_nothing_is_masked():
    """Three of four tokens count; the first is masked in both draws, the second in one, the third in none."""
    masks = torch.tensor([[[True, True, False, True], [True, False, False, True]]])
    counted = torch.tensor([[True, True, True, False]])
    probability = torch.tensor([[[0.5, 0.2, 0.3, 0.1], [0.4, 0.6, 0.3, 0.1]]])
    log_prob = probability.log().requires_grad_()
    bound = F.mean_eubo(log_prob, masks, counted, beta=2.0)
    first = math.log((0.25 / (2 / 3) + 0.16 / (1 / 3)) / 2) / 2
    second = math.log(0.04 / (2 / 3) / 2) / 2
    torch.testing.assert_close(bound.detach(), torch.tensor([(first + second) / 2]))
    bound.sum().backward()
    # Half of what is shared out within a token; the second has one draw.
    assert log_prob.grad[0, :, 1].tolist() == pytest.approx([0.5, 0.0])
    assert log_prob.grad[0, :, 2:].abs().max() == 0


def test_masks_in_the_middle_of_a_block_keep_what_is_before_and_hide_what_is_behind():
    counted = (torch.arange(12) < 7).expand(500, -1)
    masks = F.block_random_masks(torch.arange(500), counted, draws=2, block_length=4, perturbation=0.0)
    assert masks[..., 7:].all()
    in_first = masks[..., :4].any(-1)
    assert masks[in_first][:, 4:].all()
    assert masks[in_first][:, :4].sum(-1).unique().tolist() == [1, 2, 3, 4]
    assert masks[~in_first][:, 4:7].sum(-1).unique().tolist() == [1, 2, 3]


def test_merged_steps_count_what_happened_and_leave_out_what_an_early_exit_filled_in():
    reveal_step = torch.tensor([[5, 0, 2, 2, 9, 1], [0, 1, -1, -1, 2, 3]])
    # Of the first row 0, 1, 2, 5 and 9 happened.
    assert F.merged_steps(reveal_step, 2).tolist() == [[1, 0, 1, 1, 2, 0], [0, 0, -1, -1, 1, 1]]
