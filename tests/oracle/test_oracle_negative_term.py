"""The forms of the negative term: which are bounded below, and where they lead, by enumeration."""

import pytest
import torch
from torch import Tensor

from oracle.tabular import (
    PAIR_COMPLETIONS,
    Trajectories,
    population_loss,
    population_signal,
    random_tables,
    sequence_log_prob,
    total_variation,
    train,
)
from oracle.test_oracle_fixed_points import ALPHA, REFERENCES, REWARD, TARGETS

BOUNDED = ("likelihood", "likelihood_ratio")


def signal_of(baseline: str, table: Tensor, behaviour: Tensor, reward: Tensor = REWARD) -> Tensor:
    return population_signal(
        baseline,
        Trajectories,
        table=table,
        behaviour=behaviour,
        reference=REFERENCES,
        reward=reward.repeat(6).expand(2, -1),
        temperature=ALPHA,
    )


def trained(baseline: str, negative_term: str, *, steps_per_buffer: int) -> Tensor:
    """Distance to the target after training from the reference, for a consistent reference and an inconsistent one."""
    behaviour = REFERENCES.clone()

    def loss(table: Tensor, step: int) -> Tensor:
        if step % steps_per_buffer == 0:
            behaviour.copy_(table.detach())
        signal = signal_of(baseline, table, behaviour)
        return population_loss(table, PAIR_COMPLETIONS, signal, negative_term=negative_term, behaviour=behaviour)

    return total_variation(sequence_log_prob(train(REFERENCES, loss, steps=300)).exp(), TARGETS)


@pytest.mark.parametrize("baseline", ["group", "negative", "policy"])
@pytest.mark.parametrize("negative_term", BOUNDED)
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e6])
def test_loss_is_never_negative_however_extreme_the_policy(baseline, negative_term, scale):
    tables = scale * random_tables(9, 2)
    signal = signal_of(baseline, REFERENCES, REFERENCES)
    assert signal.amin() < 0
    loss = population_loss(tables, PAIR_COMPLETIONS, signal, negative_term=negative_term, behaviour=REFERENCES)
    assert loss >= 0
    assert loss.isfinite()


@pytest.mark.parametrize("negative_term", BOUNDED)
def test_where_the_log_likelihood_falls_for_ever_the_loss_levels_off(negative_term):
    """Straight on along the same direction, the unbounded loss falls by the same amount at each step."""
    signal = signal_of("group", REFERENCES, REFERENCES)

    def loss(table: Tensor, form: str) -> Tensor:
        return population_loss(table, PAIR_COMPLETIONS, signal, negative_term=form, behaviour=REFERENCES)

    start = REFERENCES.clone().requires_grad_()
    loss(start, "log_likelihood").backward()
    away = [REFERENCES - step * start.grad for step in (1e3, 1e4, 1e5)]
    first, second, third = (loss(table, "log_likelihood") for table in away)
    assert third - second < 5 * (second - first) < 0
    assert all(loss(table, negative_term) >= 0 for table in away)


@pytest.mark.parametrize("baseline", ["group", "policy"])
def test_ratio_reaches_the_target_where_rollouts_are_of_the_current_policy(baseline):
    assert (trained(baseline, "likelihood_ratio", steps_per_buffer=1) < 0.002).all()


@pytest.mark.parametrize(("baseline", "steps_per_buffer"), [("group", 1), ("group", 10), ("policy", 600)])
def test_likelihood_is_stationary_beside_the_target(baseline, steps_per_buffer):
    """The push fades with p, so that it no longer cancels the pull at the target. The way there is 0.29 long."""
    distance = trained(baseline, "likelihood", steps_per_buffer=steps_per_buffer)
    assert ((distance > 0.003) & (distance < 0.06)).all()


@pytest.mark.parametrize("negative_term", ["log_likelihood", *BOUNDED])
def test_negative_baseline_passes_the_target_in_every_form(negative_term):
    assert (trained("negative", negative_term, steps_per_buffer=1) > 0.3).all()


def test_gradient_of_the_ratio_at_the_behaviour_policy_is_that_of_the_published_loss():
    signal = signal_of("group", REFERENCES, REFERENCES)
    gradients = []
    for form in ("log_likelihood", "likelihood_ratio"):
        table = REFERENCES.clone().requires_grad_()
        population_loss(table, PAIR_COMPLETIONS, signal, negative_term=form, behaviour=REFERENCES).backward()
        gradients.append(table.grad)
    torch.testing.assert_close(*gradients)
