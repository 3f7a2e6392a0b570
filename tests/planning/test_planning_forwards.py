"""The forwards that `plan` counts against those that training runs, buffer by buffer and phase by phase."""

from collections import Counter

import pytest
from dmpo_runs import loader, module, trainer

from dmpo_lightning import WDCE, WDDO, ConfidenceSampler, ElboEstimator, RandomOrderSampler, TrajectoryEstimator
from dmpo_lightning.planning.memory import rehearsed
from dmpo_lightning.planning.run import Run
from dmpo_lightning.planning.strategy import Sharding
from dmpo_lightning.schedule import Schedule
from tiers import slow_unless

LENGTH, GROUP, PROMPTS = 8, 4, 3


def elbo(**options) -> WDCE:
    return WDCE(reward_temperature=0.1, replicates=2, estimator=ElboEstimator(samples=2), **options)


TRAJECTORY = {"estimator": TrajectoryEstimator(3), "reward_temperature": 0.1, "replicates": 2}
CASES = {
    "a few rollouts at a time": {"rows_per_forward": 5},
    "policy baseline, steps across groups": {"objective": elbo(baseline="policy"), "micro_batch_size": 3},
    "trajectory and policy baseline": {
        "objective": WDCE(**TRAJECTORY, baseline="policy"),
        "sampler": RandomOrderSampler(denoising_steps=4),
    },
    "WDDO": {"objective": WDDO(reward_temperature=0.1, replicates=4)},
}


def make(options: dict):
    defaults = {"objective": elbo(), "sampler": ConfidenceSampler(denoising_steps=4), "micro_batch_size": 6}
    return module(completion_length=LENGTH, group_size=GROUP, num_iterations=2, **(defaults | options))


def trained(options: dict, schedule: Schedule, tmp_path) -> Counter:
    """Forwards of the first buffer by phase."""
    # What no method of the objective runs is sampling.
    counts, phases, dmpo = Counter(), ["sampling"], make(options)

    def within(phase, method):
        def noted(*arguments, **options):
            phases.append(phase)
            result = method(*arguments, **options)
            phases.pop()
            return result

        return noted

    for phase, name in (("scoring", "prepare"), ("scoring", "before_step"), ("training", "loss")):
        setattr(dmpo.objective, name, within(phase, getattr(dmpo.objective, name)))
    for network in dmpo.policy.networks:
        network.register_forward_pre_hook(lambda *_: counts.update([phases[-1]]))
    limits = {"max_steps": schedule.optimizer_steps, "limit_val_batches": 0}
    fit = trainer(tmp_path, accumulate_grad_batches=schedule.accumulation, **limits)
    fit.fit(dmpo, loader(batch_size=PROMPTS))
    return counts


@pytest.mark.parametrize("name", slow_unless(lambda name: "policy baseline" in name, CASES))
def test_as_many_forwards_are_planned_as_training_runs(name, tmp_path):
    options = CASES[name]
    schedule = Schedule(
        group_size=GROUP,
        prompts_per_buffer=PROMPTS,
        micro_batch_size=options.get("micro_batch_size", 6),
        num_iterations=2,
        accumulation=2,
    )
    planned = rehearsed(Run("small", make(options).to("meta"), schedule, 4, LENGTH, Sharding("alone"), on_cpu=True))
    assert trained(options, schedule, tmp_path) == {
        name: each.forwards for name, each in planned.phases.items() if each.forwards
    }


def test_all_rounds_of_sampling_are_planned():
    def sampling(rounds: int) -> int:
        schedule = Schedule(GROUP, 2, GROUP, sampling_rounds=rounds)
        options = {"micro_batch_size": GROUP, "sampling_rounds": rounds}
        run = Run("small", make(options).to("meta"), schedule, 4, LENGTH, Sharding("alone"), on_cpu=True)
        return rehearsed(run).phases["sampling"].forwards

    assert (sampling(1), sampling(3)) == (4, 12)
