import pytest
import torch
from scipy.stats import chisquare

from dmpo_lightning.functional import row_keys
from dmpo_lightning.objectives import TrajectoryEstimator
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rollout import Rollouts, Sampling, collect
from dmpo_lightning.samplers import RandomOrderSampler, Samples
from helpers import FixedLogits, perturb, prompt_batch, tiny_policy

LENGTH = 6


def sample(policy: Policy, sampler: RandomOrderSampler, rows: int, length: int = LENGTH) -> Samples:
    batch = prompt_batch(policy, ["12"] * rows)
    keys = row_keys(0, batch.prompt_index, group_size=1, buffer=0).squeeze(1)
    with evaluating(policy):
        return sampler.sample(policy, batch.prompt_ids, batch.prompt_mask, completion_length=length, keys=keys)


def rollouts_of(policy: Policy, sampler: RandomOrderSampler) -> Rollouts:
    reward = Reward(lambda example, text: float(len(text)))
    return collect(policy, reward, prompt_batch(policy, ["12", "1234", "3"]), Sampling(sampler, LENGTH, 4))


def test_the_order_is_uniform():
    policy = tiny_policy(model=FixedLogits(torch.zeros(32)), with_reference=False)
    revealed = sample(policy, RandomOrderSampler(), 6000, length=4).reveal_step
    counts = (revealed * torch.tensor([64, 16, 4, 1])).sum(-1).unique(return_counts=True)[1]
    assert len(counts) == 24
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_the_order_does_not_depend_on_the_tokens():
    flat = tiny_policy(model=FixedLogits(torch.zeros(32)), with_reference=False)
    orders = [sample(policy, RandomOrderSampler(), 8).reveal_step for policy in (flat, tiny_policy(0), tiny_policy(1))]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])
    assert RandomOrderSampler().order_is_independent


@pytest.mark.parametrize(("steps", "counts"), [(None, [1] * 6), (4, [2, 2, 1, 1]), (1, [6])])
def test_each_step_reveals_the_planned_number_of_positions(steps, counts):
    for row in sample(tiny_policy(with_reference=False), RandomOrderSampler(denoising_steps=steps), 5).reveal_step:
        assert row.bincount(minlength=len(counts)).tolist() == counts


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("steps", "block"), [(None, None), (3, None), (4, None), (None, 2), (3, 2), (4, 3), (2, 3)])
def test_the_recorded_log_prob_equals_a_replay_of_the_order(temperature, steps, block):
    policy = tiny_policy()
    sampler = RandomOrderSampler(temperature=temperature, denoising_steps=steps, block_length=block)
    rollouts = rollouts_of(policy, sampler)
    with evaluating(policy):
        replayed = TrajectoryEstimator().log_prob(policy, rollouts, rows_per_forward=5)
    torch.testing.assert_close(rollouts.sampled_log_prob.sum(-1), replayed, atol=1e-5, rtol=1e-5)
    assert (replayed < -1).all()


def test_within_blocks_the_order_is_uniform_and_the_blocks_come_from_left_to_right():
    policy = tiny_policy(model=FixedLogits(torch.zeros(32)), with_reference=False)
    revealed = sample(policy, RandomOrderSampler(block_length=3), 6000).reveal_step
    assert (revealed[:, :3] < 3).all()
    assert (revealed[:, 3:] >= 3).all()
    # 6 orders of the first block times 6 of the second, all equally often.
    counts = (revealed % 3 * torch.tensor([243, 81, 27, 9, 3, 1])).sum(-1).unique(return_counts=True)[1]
    assert len(counts) == 36
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_one_block_of_the_whole_completion_is_no_blocks_at_all():
    policy = tiny_policy(with_reference=False)
    whole, none = (sample(policy, RandomOrderSampler(block_length=block), 8) for block in (LENGTH, None))
    assert torch.equal(whole.completion_ids, none.completion_ids)
    assert torch.equal(whole.reveal_step, none.reveal_step)


@pytest.mark.parametrize(("block", "steps", "counts"), [(3, None, [1] * 6), (3, 4, [2, 1, 2, 1]), (2, 3, [2, 2, 2])])
def test_each_block_takes_equally_many_steps(block, steps, counts):
    sampler = RandomOrderSampler(denoising_steps=steps, block_length=block)
    sampler.validate(LENGTH)
    for row in sample(tiny_policy(with_reference=False), sampler, 5).reveal_step:
        assert row.bincount(minlength=len(counts)).tolist() == counts


def test_blocks_that_do_not_divide_completion_or_steps_are_errors():
    with pytest.raises(ValueError, match="`block_length` must be at least 1"):
        RandomOrderSampler(block_length=0)
    with pytest.raises(ValueError, match="must be a multiple of `block_length`, got 6 and 4"):
        RandomOrderSampler(block_length=4).validate(6)
    with pytest.raises(ValueError, match="`denoising_steps` must be a multiple of the number of blocks, 3"):
        RandomOrderSampler(block_length=2, denoising_steps=4).validate(6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("steps", [None, 4])
def test_log_rnd_is_zero_where_the_reference_equals_the_policy(temperature, steps):
    policy = tiny_policy()
    policy.reference.announce_update()  # it is, but the replay shall show it
    rollouts = rollouts_of(policy, RandomOrderSampler(temperature=temperature, denoising_steps=steps))
    with evaluating(policy):
        log_rnd = TrajectoryEstimator().log_rnd(policy, rollouts, rows_per_forward=5)
    torch.testing.assert_close(log_rnd, torch.zeros(3, 4), atol=1e-5, rtol=0)


def moved_log_rnd() -> tuple[torch.Tensor, torch.Tensor]:
    """Of a policy that left its reference; and the difference of two replays of the same orders."""
    policy, estimator = tiny_policy(), TrajectoryEstimator()
    perturb(policy.model)
    policy.reference.announce_update()
    rollouts = rollouts_of(policy, RandomOrderSampler())
    with evaluating(policy):
        replays = [estimator.log_prob(policy, rollouts, reference=side, rows_per_forward=12) for side in (True, False)]
        return estimator.log_rnd(policy, rollouts, rows_per_forward=12), replays[0] - replays[1]


def test_log_rnd_is_the_difference_of_the_two_replays_once_the_policy_has_moved():
    log_rnd, expected = moved_log_rnd()
    torch.testing.assert_close(log_rnd, expected, atol=1e-5, rtol=1e-5)
    assert log_rnd.abs().max() > 0.1


def test_the_policy_prefers_its_own_completions_to_the_references():
    """The mean of log p_ref - log p_old under p_old is a negative KL divergence."""
    assert moved_log_rnd()[0].mean() < 0
