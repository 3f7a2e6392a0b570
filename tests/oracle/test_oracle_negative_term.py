"""The forms of the negative term: which are bounded below, and where they lead, by enumeration."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from oracle.tabular import (
    PAIR_COMPLETIONS,
    Trajectories,
    conditionals,
    population_loss,
    population_signal,
    random_tables,
    sequence_log_prob,
    total_variation,
    train,
)
from oracle.test_oracle_fixed_points import ALPHA, REFERENCES, REWARD, TARGETS

AT = (0, 25, 50, 100, 200)
"""Updates before which the distance is measured, as well as at the end."""


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


def trained(baseline: str, negative_term: str, *, steps_per_buffer: int, steps: int = 300) -> dict[int, Tensor]:
    """Distance to the target by the number of updates, from the reference on: for a consistent reference and for an
    inconsistent one.
    """
    behaviour, distances = REFERENCES.clone(), {}

    def measure(table: Tensor, step: int) -> None:
        distances[step] = total_variation(sequence_log_prob(table.detach()).exp(), TARGETS)

    def loss(table: Tensor, step: int) -> Tensor:
        if step in AT:
            measure(table, step)
        if step % steps_per_buffer == 0:
            behaviour.copy_(table.detach())
        signal = signal_of(baseline, table, behaviour)
        return population_loss(table, PAIR_COMPLETIONS, signal, negative_term=negative_term)

    measure(train(REFERENCES, loss, steps=steps), steps)
    return distances


def is_getting_closer(distances: dict[int, Tensor]) -> bool:
    """At every number of updates, within the noise of a step."""
    values = [distances[step] for step in sorted(distances)]
    return all(bool((later <= earlier + 0.005).all()) for earlier, later in pairwise(values))


@pytest.mark.parametrize("baseline", ["group", "negative", "policy"])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e6])
def test_loss_is_never_negative_however_extreme_the_policy(baseline, scale):
    tables = scale * random_tables(9, 2)
    signal = signal_of(baseline, REFERENCES, REFERENCES)
    assert signal.amin() < 0
    loss = population_loss(tables, PAIR_COMPLETIONS, signal, negative_term="likelihood")
    assert loss >= 0
    assert loss.isfinite()


def test_where_the_log_likelihood_falls_for_ever_the_likelihood_levels_off():
    """Straight on along the same direction, the unbounded loss falls by the same amount at each step."""
    signal = signal_of("group", REFERENCES, REFERENCES)

    def loss(table: Tensor, form: str) -> Tensor:
        return population_loss(table, PAIR_COMPLETIONS, signal, negative_term=form)

    start = REFERENCES.clone().requires_grad_()
    loss(start, "log_likelihood").backward()
    away = [REFERENCES - step * start.grad for step in (1e3, 1e4, 1e5)]
    first, second, third = (loss(table, "log_likelihood") for table in away)
    assert third - second < 5 * (second - first) < 0
    assert all(loss(table, "likelihood") >= 0 for table in away)


@pytest.mark.parametrize("baseline", ["group", "policy"])
def test_log_likelihood_reaches_the_target_where_rollouts_are_of_the_current_policy(baseline):
    distances = trained(baseline, "log_likelihood", steps_per_buffer=1)
    assert is_getting_closer(distances)
    assert (distances[50] < 0.03).all()
    assert (distances[300] < 0.002).all()


@pytest.mark.parametrize(("baseline", "steps_per_buffer"), [("group", 1), ("group", 10), ("policy", 600)])
def test_likelihood_leads_into_a_flat_valley_at_the_target(baseline, steps_per_buffer):
    """The push fades with p, and with it what is left of the gradient. The way there is 0.29 long."""
    distances = trained(baseline, "likelihood", steps_per_buffer=steps_per_buffer)
    assert ((distances[300] > 0.003) & (distances[300] < 0.06)).all()
    # It stays there, and came as fast as the published form, if the policy that is pushed is the one that sampled.
    if steps_per_buffer == 1:
        assert is_getting_closer(distances)
        torch.testing.assert_close(distances[300], distances[200], atol=1e-3, rtol=0)
        assert (distances[50] < 0.06).all()


@pytest.mark.parametrize("negative_term", ["log_likelihood", "likelihood"])
@pytest.mark.parametrize("baseline", ["group", "policy"])
def test_the_target_itself_is_stationary_in_every_form(baseline, negative_term):
    """All weights are 1 there. It is the first problem's, whose reference and target are order-consistent."""
    table = conditionals(TARGETS[0].double())[None].requires_grad_()
    signal = population_signal(
        baseline,
        Trajectories,
        table=table,
        behaviour=table.detach(),
        reference=REFERENCES[:1],
        reward=REWARD.repeat(6)[None],
        temperature=ALPHA,
    )
    population_loss(table, PAIR_COMPLETIONS, signal.detach(), negative_term=negative_term).backward()
    torch.testing.assert_close(table.grad, torch.zeros_like(table), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "shift"), [("consistent", 0.0), ("inconsistent", 0.84)])
def test_a_baseline_is_a_control_variate_of_consistent_policies_alone(kind, shift):
    """While theta is the policy that sampled. How far b moves the mean gradient is measured in that without b."""
    tables = random_tables(1000, 6)
    policies = tables if kind == "inconsistent" else conditionals(sequence_log_prob(tables).exp().double())
    reward = torch.rand(6, 8, generator=torch.Generator().manual_seed(1000), dtype=torch.float64).repeat(1, 6)

    def mean_gradient(baseline: str) -> Tensor:
        table, options = policies.clone().requires_grad_(), {"behaviour": policies, "reference": policies}
        signal = population_signal(baseline, Trajectories, table=policies, reward=reward, temperature=0.5, **options)
        population_loss(table, PAIR_COMPLETIONS, signal).backward()
        return table.grad

    without = mean_gradient("none")
    moved = {name: ((mean_gradient(name) - without).norm() / without.norm()).item() for name in ("group", "policy")}
    assert moved == pytest.approx({"group": shift, "policy": shift}, abs=0.005)
    assert (mean_gradient("negative") - without).norm() / without.norm() > 0.9


@pytest.mark.parametrize("negative_term", ["log_likelihood", "likelihood"])
def test_on_one_buffer_the_group_baseline_leads_away_from_the_target_in_every_form(negative_term):
    """w - 1 is a control variate while theta is the policy that sampled, and a wrong target afterwards."""
    distances = trained("group", negative_term, steps_per_buffer=600, steps=100)
    assert (distances[100] > distances[0] + 0.05).all()


@pytest.mark.parametrize("negative_term", ["log_likelihood", "likelihood"])
def test_negative_baseline_passes_the_target_in_every_form(negative_term):
    assert (trained("negative", negative_term, steps_per_buffer=1)[300] > 0.3).all()
