"""What the guards' rules find in series of numbers."""

import random

import pytest

from dmpo_lightning import Guards
from dmpo_lightning.callbacks.guards import NUMBERS, History, finding

HEALTHY = {
    "reward/informative_groups": 0.6,
    "weight/ess": 0.7,
    "policy/entropy": 0.5,
    "policy/log_rnd": -0.4,
    "policy/log_rnd_spread": 0.3,
    "completion/empty": 0.0,
    "completion/repetition": 0.05,
    "completion/truncated": 0.1,
    "routing/lowest_entropy": 0.9,
}
THRESHOLDS = Guards().thresholds


def of_rewards(*rewards, spread=0.4, **means):
    """One buffer for each mean reward. ``spread`` is the standard deviation between its 64 prompts."""
    history = History(10)
    for reward in rewards:
        row = {**HEALTHY, "reward": reward, "reward_square": reward**2 + spread**2, **means}
        history.add(row, prompts=64, group=4, length=20)
    return history


def changed(rewards, **last):
    """Healthy buffers, and three in which some numbers are others."""
    history = of_rewards(*rewards)
    for _ in range(3):
        row = {**HEALTHY, "reward": rewards[-1], "reward_square": rewards[-1] ** 2 + 0.16, **last}
        history.add(row, prompts=64, group=4, length=20)
    return history


def found(history):
    return {name for name in NUMBERS if finding(history, name, THRESHOLDS[name]) is not None}


def said(history, name):
    found = finding(history, name, THRESHOLDS[name])
    assert found is not None
    return found


def test_an_estimate_is_the_mean_with_its_error_over_prompts():
    """Of 100 prompts 50 have reward 1: the variance is 1/4, and the error sqrt(1/4 / 99)."""
    history = History(1)
    history.add({"reward": 0.5, "reward_square": 0.5}, prompts=100, group=4, length=20)
    assert history.reward == (0.5, pytest.approx(0.0502519))
    history = History(1)
    history.add({"reward": 0.5, "reward_square": 0.5}, prompts=99, group=4, length=20)
    assert history.reward is None


def test_a_healthy_run_is_left_alone():
    rewards = [0.5 + 0.4 * step / 50 for step in range(50)]
    for end in range(1, 51):
        assert found(of_rewards(*rewards[:end])) == set()


def test_a_solved_task_is_no_collapse():
    """All completions right and alike, sure of themselves: the reward says that it is as it should be."""
    sure = {"policy/entropy": 0.001, "weight/ess": 1.0}
    assert found(changed([0.4, 0.4, *[0.97] * 10], **sure)) == set()
    assert found(changed([*[0.4] * 10, 0.97], **sure)) == set(), "a rise that most of the window does not show yet"
    assert found(changed([0.4] * 12, **sure)) == {"entropy"}


def test_a_reward_that_falls_by_more_than_its_errors_is_found_with_both_numbers():
    """The last window holds 640 prompts, so that errors are .4 / sqrt(639) = .016."""
    history = of_rewards(*[0.8] * 10, *[0.6] * 9)
    value, message = said(history, "reward_drop")
    # A difference of .18, over the errors of both.
    assert value == pytest.approx(0.18 / (0.4 / 639**0.5 + history.reward[1]), rel=1e-4)
    assert "from 0.800 at its best to 0.620" in message
    assert "lower learning rate" in message
    assert found(of_rewards(*[0.8] * 10, *[0.76] * 20)) == set()


def test_a_collapse_in_the_first_steps_is_found_too():
    assert "reward_drop" in found(of_rewards(0.8, 0.8, *[0.0] * 8, spread=0.1))


def test_chance_alone_is_no_fall_in_two_thousand_buffers():
    """A plateau whose running mean has hundreds of chances to set a record and to fall below it."""
    draws, history = random.Random(0), History(10)
    for _ in range(2000):
        rewards = [sum(draws.random() < 0.7 for _ in range(4)) / 4 for _ in range(16)]
        squares = sum(reward**2 for reward in rewards) / 16
        history.add({"reward": sum(rewards) / 16, "reward_square": squares}, prompts=16, group=4, length=20)
        assert finding(history, "reward_drop", 4.0) is None


def test_rounding_of_a_constant_reward_is_no_fall():
    assert found(of_rewards(*[0.1] * 10, *[0.1 - 1e-9] * 10, spread=0.0)) == set()


def test_few_prompts_make_the_window_longer():
    history = History(10)
    for _ in range(49):
        history.add({**HEALTHY, "reward": 1.0, "reward_square": 1.0}, prompts=2, group=4, length=20)
    assert (history.buffers, history.reward) == (50, None)
    history.add({**HEALTHY, "reward": 1.0, "reward_square": 1.0}, prompts=2, group=4, length=20)
    assert history.reward == (1.0, 0.0)


def test_vanished_information_is_told_apart_from_a_solved_task():
    vanished = {"reward/informative_groups": 0.0}
    _, message = said(of_rewards(*[0.0] * 10, spread=0.0, **vanished), "informative_groups")
    assert "too hard or too easy" in message
    assert "informative_groups" not in found(of_rewards(0.3, 0.3, *[0.95] * 10, spread=0.2, **vanished))
    assert "informative_groups" not in found(of_rewards(*[0.0] * 9, spread=0.0, **vanished)), "a window is not full"


@pytest.mark.parametrize(
    ("change", "guard", "number"),
    [
        ({"policy/entropy": 0.005}, "entropy", "to 1.0% of what it was"),
        ({"weight/ess": 0.26}, "effective_rollouts", "1.04 rollouts of a group of 4"),
        ({"completion/repetition": 0.8}, "repetition", "80%"),
        ({"completion/empty": 0.7}, "empty", "70%"),
        ({"completion/truncated": 0.95}, "truncated", "95% of the completions have no end token"),
        ({"policy/log_rnd": -92.0}, "log_rnd", "4.60 nats per token"),
        ({"policy/log_rnd_spread": 11.0}, "log_rnd", "0.55 nats per token"),
        ({"routing/lowest_entropy": 0.6}, "routing", "is 67% of what it was"),
    ],
)
def test_a_number_out_of_its_range_is_said_by_its_guard_alone(change, guard, number):
    history = changed([0.5] * 12, **change)
    assert found(history) == {guard}
    assert number in said(history, guard)[1]


def test_two_odd_buffers_are_not_enough():
    history = of_rewards(*[0.5] * 12)
    for _ in range(2):
        row = {**HEALTHY, "reward": 0.5, "reward_square": 0.41, "completion/empty": 0.7}
        history.add(row, prompts=64, group=4, length=20)
    assert found(history) == set()


def test_numbers_that_an_objective_does_not_have_are_not_judged():
    history = History(10)
    for _ in range(20):
        history.add({"reward": 0.5, "reward_square": 0.5}, prompts=64, group=4, length=20)
    assert found(history) == set()
