"""The losses against constants worked out by hand, and against each other."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dmpo_lightning.functional import (
    denoising_cross_entropy,
    denoising_likelihood,
    draw_masks,
    elbo,
    group_baseline,
    importance_weights,
    wdce_loss,
    wddo_loss,
)

# Two replicates of three tokens; both masked log-probs and one unmasked that must not count.
LOG_PROB = torch.tensor([[[-1.0, -2.0, -9.0], [0.0, 0.0, -4.0]]])
MASKS = torch.tensor([[[True, True, False], [False, False, True]]])


def test_cross_entropy_is_the_mean_over_masked_tokens_then_over_replicates():
    # (1 + 2) / 2 = 1.5 and 4 / 1 = 4; mean 2.75.
    assert denoising_cross_entropy(LOG_PROB, MASKS).tolist() == [2.75]


def test_cross_entropy_is_the_negative_elbo_per_token():
    torch.testing.assert_close(3 * denoising_cross_entropy(LOG_PROB, MASKS), -elbo(LOG_PROB, MASKS))


def test_cross_entropy_has_gradient_at_masked_tokens_only():
    log_prob = LOG_PROB.clone().requires_grad_()
    denoising_cross_entropy(log_prob, MASKS).sum().backward()
    # Half for the mean of two replicates, half again for the two masked tokens of the first.
    assert log_prob.grad.tolist() == [[[-0.25, -0.25, 0.0], [0.0, 0.0, -0.5]]]


def test_wdce_is_the_signal_weighted_mean():
    # (1.5 x 2 - 0.5 x 4) / 2 = 0.5.
    loss = wdce_loss(torch.tensor([2.0, 4.0]), torch.tensor([1.5, -0.5]), planned_rollouts=2)
    assert loss.item() == 0.5


def test_likelihood_is_the_mean_over_masked_tokens_then_over_replicates():
    expected = ((math.exp(-1) + math.exp(-2)) / 2 + math.exp(-4)) / 2
    assert denoising_likelihood(LOG_PROB, MASKS).item() == pytest.approx(expected)


def test_bounded_wdce_pulls_by_cross_entropy_and_pushes_by_likelihood():
    cross_entropy, likelihood = torch.tensor([2.0, 4.0, 8.0]), torch.tensor([0.5, 0.25, 0.125])
    signal = torch.tensor([1.5, -0.5, 0.0])
    # (1.5 x 2 + 0.5 x 0.25) / 3.
    loss = wdce_loss(cross_entropy, signal, planned_rollouts=3, likelihood=likelihood)
    assert loss.item() == pytest.approx(3.125 / 3)


def test_gradient_of_the_bounded_loss_equals_finite_differences():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 3, 5, generator=generator, dtype=torch.float64)
    masks = draw_masks(torch.arange(4), length=3, replicates=2)
    signal = torch.tensor([1.5, -0.75, -0.75, 0.0], dtype=torch.float64)

    def loss(theta: Tensor) -> Tensor:
        log_prob = theta.log_softmax(-1)[..., 0]
        return wdce_loss(
            denoising_cross_entropy(log_prob, masks),
            signal,
            planned_rollouts=4,
            likelihood=denoising_likelihood(log_prob, masks),
        )

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_likelihood_of_half_precision_is_taken_in_full():
    half = denoising_likelihood(LOG_PROB.to(torch.bfloat16), MASKS)
    torch.testing.assert_close(half, denoising_likelihood(LOG_PROB, MASKS))


def test_wdce_divides_by_the_planned_rollouts_so_that_skipping_zero_signal_changes_nothing():
    cross_entropy, signal = torch.tensor([2.0, 4.0, 8.0]), torch.tensor([1.5, 0.0, -0.5])
    kept = signal != 0
    skipped = wdce_loss(cross_entropy[kept], signal[kept], planned_rollouts=3)
    assert skipped == wdce_loss(cross_entropy, signal, planned_rollouts=3)


def test_micro_batches_of_a_buffer_add_up_to_the_whole():
    cross_entropy, signal = torch.tensor([2.0, 4.0, 8.0, 1.0]), torch.tensor([1.5, 1.0, -0.5, 0.25])
    parts = [wdce_loss(cross_entropy[i : i + 2], signal[i : i + 2], planned_rollouts=4) for i in (0, 2)]
    torch.testing.assert_close(sum(parts), wdce_loss(cross_entropy, signal, planned_rollouts=4))


def test_no_gradient_flows_into_the_signal_or_the_weight():
    cross_entropy, signal = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    wdce_loss(cross_entropy, signal, planned_rollouts=2).backward()
    wddo_loss(cross_entropy, signal, length=3, beta=1.0, planned_rollouts=2).backward()
    assert signal.grad is None
    assert cross_entropy.grad is not None


def test_wddo_at_theta_equal_to_old_by_hand():
    # D = 0, so both log sigmas are -log 2: F = (w + 1) log 2, here 3 log 2 and log 2; sum 4 log 2.
    # Times 2 / (beta L n) = 2 / (0.5 x 4 x 2) = 1/2.
    loss = wddo_loss(torch.zeros(2), torch.tensor([2.0, 0.0]), length=4, beta=0.5, planned_rollouts=2)
    assert loss.item() == pytest.approx(2 * math.log(2))


def test_wddo_away_from_old_by_hand():
    # beta D = log 3: sigma = 3/4 and 1/4, so F = -(2 log 3/4 + log 1/4) = log(16/9) + log 4 = log(64/9); times 2 / 3.
    loss = wddo_loss(torch.tensor([math.log(3)]), torch.tensor([2.0]), length=3, beta=1.0, planned_rollouts=1)
    assert loss.item() == pytest.approx(2 / 3 * math.log(64 / 9))


@pytest.mark.parametrize("weight", [0.25, 1.0, 4.0])
def test_wddo_of_one_rollout_is_smallest_where_the_ratio_is_the_weight(weight):
    log_ratio = torch.tensor([math.log(weight)], requires_grad=True)
    wddo_loss(log_ratio, torch.tensor([weight]), length=3, beta=1.0, planned_rollouts=1).backward()
    assert log_ratio.grad.abs().item() < 1e-6
    near = torch.tensor([math.log(weight) - 0.1, math.log(weight), math.log(weight) + 0.1])
    left, middle, right = (
        wddo_loss(ratio[None], torch.tensor([weight]), length=3, beta=1.0, planned_rollouts=1) for ratio in near
    )
    assert middle < min(left, right)


def test_wddo_stays_finite_for_huge_ratios():
    loss = wddo_loss(torch.tensor([1e4, -1e4]), torch.ones(2), length=1, beta=1.0, planned_rollouts=2)
    # F is 1e4 on either side; 2 / (1 x 1 x 2) times the sum.
    assert loss.item() == pytest.approx(2e4)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_gradient_of_wddo_at_theta_equal_to_old_is_that_of_wdce_with_the_group_baseline(beta):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, 5, 3, generator=generator)
    masks = draw_masks(torch.arange(6), length=5, replicates=4)
    reward = torch.rand(1, 6, generator=generator)
    weights = importance_weights(torch.zeros(1, 6), reward, reward_temperature=0.2)

    def gradient(loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        theta = logits.clone().requires_grad_()
        loss_of(theta.log_softmax(-1)[..., 0]).backward()
        return theta.grad

    def wddo(log_prob: Tensor) -> Tensor:
        log_ratio = elbo(log_prob, masks) - elbo(log_prob, masks).detach()
        return wddo_loss(log_ratio, weights[0], length=5, beta=beta, planned_rollouts=6)

    def wdce(log_prob: Tensor) -> Tensor:
        signal = (weights - group_baseline(reward))[0]
        return wdce_loss(denoising_cross_entropy(log_prob, masks), signal, planned_rollouts=6)

    torch.testing.assert_close(gradient(wddo), gradient(wdce))
    assert gradient(wdce).abs().max() > 1e-3
