"""The forwards that `plan` counts against those that training runs, buffer by buffer and phase by phase."""

from collections import Counter
from dataclasses import replace

import pytest
from dmpo_runs import loader, module, trainer

from dmpo_lightning import WDCE, WDDO, ConfidenceSampler, ElboEstimator, RandomOrderSampler, TrajectoryEstimator
from dmpo_lightning.planning import Forwards, Workload
from dmpo_lightning.schedule import Schedule

LENGTH, GROUP, PROMPTS = 8, 4, 3


def run(options: dict, accumulation: int, buffer_steps: int, tmp_path) -> Counter:
    """Forwards of the first buffer by phase: sampling, scoring, baseline, loss."""
    counts, phases = Counter(), []
    dmpo = module(completion_length=LENGTH, group_size=GROUP, **options)

    def within(phase, method):
        def noted(*arguments, **options):
            phases.append(phase)
            result = method(*arguments, **options)
            phases.pop()
            return result

        return noted

    dmpo._sample = within("sampling", dmpo._sample)
    for phase, name in (("scoring", "prepare"), ("baseline", "before_step"), ("loss", "loss")):
        setattr(dmpo.objective, name, within(phase, getattr(dmpo.objective, name)))
    for network in dmpo.policy.networks:
        network.register_forward_pre_hook(lambda *_: counts.update([phases[-1]]))
    limits = {"max_steps": buffer_steps, "limit_val_batches": 0, "accumulate_grad_batches": accumulation}
    trainer(tmp_path, **limits).fit(dmpo, loader(batch_size=PROMPTS))
    return counts


def elbo(**options) -> WDCE:
    return WDCE(reward_temperature=0.1, replicates=2, estimator=ElboEstimator(samples=2), **options)


TRAJECTORY = {"estimator": TrajectoryEstimator(3), "reward_temperature": 0.1, "replicates": 2}
CASES = {
    "elbo": {},
    "a few rollouts at a time": {"rows_per_forward": 5},
    "policy baseline": {"objective": elbo(baseline="policy")},
    "policy baseline, steps across groups": {"objective": elbo(baseline="policy"), "micro_batch_size": 3},
    "trajectory": {"objective": WDCE(**TRAJECTORY), "sampler": RandomOrderSampler()},
    "trajectory and policy baseline": {
        "objective": WDCE(**TRAJECTORY, baseline="policy"),
        "sampler": RandomOrderSampler(denoising_steps=4),
    },
    "WDDO": {"objective": WDDO(reward_temperature=0.1, replicates=4)},
    "WDDO along a trajectory": {"objective": WDDO(**TRAJECTORY), "sampler": RandomOrderSampler()},
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_as_many_forwards_are_planned_as_training_runs(name, accumulation, tmp_path):
    options = {"objective": elbo(), "sampler": ConfidenceSampler(denoising_steps=4), "micro_batch_size": 6} | CASES[
        name
    ]
    schedule = Schedule(
        group_size=GROUP,
        prompts_per_buffer=PROMPTS,
        micro_batch_size=options["micro_batch_size"],
        num_iterations=2,
        accumulation=accumulation,
    )
    work = Workload(
        prompt_length=4,
        completion_length=LENGTH,
        schedule=schedule,
        objective=options["objective"].footprint(completion_length=LENGTH, sampler=options["sampler"]),
        sampling=options["sampler"].footprint(LENGTH),
        rows_per_forward=options.get("rows_per_forward"),
    )
    counts = run(options, accumulation, schedule.optimizer_steps, tmp_path)
    measured = Forwards(
        sampling=counts["sampling"], scoring=counts["scoring"] + counts["baseline"], training=counts["loss"]
    )
    assert Forwards.of(work) == measured


def test_all_rounds_of_sampling_are_planned():
    def planned(rounds: int) -> Forwards:
        schedule = Schedule(group_size=GROUP, prompts_per_buffer=2, micro_batch_size=GROUP, sampling_rounds=rounds)
        sampling = ConfidenceSampler(denoising_steps=4).footprint(LENGTH)
        objective = elbo().footprint(completion_length=LENGTH, sampler=ConfidenceSampler())
        return Forwards.of(Workload(4, LENGTH, schedule=schedule, objective=objective, sampling=sampling))

    assert planned(3) == replace(planned(1), sampling=3 * planned(1).sampling)
