"""Training does what the mathematics promises, through the real module."""

import pytest
import torch
from dmpo_runs import loader, module, trainer, weights

from dmpo_lightning import WDCE, WDDO, RandomOrderSampler, TrajectoryEstimator


def constant_reward(example, completion):
    return 1.0


def test_groups_of_equal_reward_give_exactly_no_gradient_under_the_negative_baseline(tmp_path):
    dmpo = module(reward=constant_reward, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    before = weights(dmpo).clone()
    trainer(tmp_path, max_steps=4).fit(dmpo, loader())
    assert torch.equal(weights(dmpo), before)


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        (WDCE(reward_temperature=0.2, replicates=4, baseline="group"), {}),
        (WDCE(reward_temperature=0.2, replicates=4, baseline="negative"), {}),
        (WDCE(reward_temperature=0.2, replicates=4, baseline="policy"), {}),
        (WDCE(reward_temperature=0.03, replicates=4, baseline="none"), {}),
        (WDCE(reward_temperature=0.2, replicates=4, target_ess=0.5), {}),
        (WDCE(reward_temperature=0.0, reward_scale=3.0, replicates=4), {}),
        (WDDO(reward_temperature=0.2, replicates=4), {}),
        (
            WDCE(reward_temperature=0.2, replicates=4, baseline="group", log_prob=TrajectoryEstimator()),
            {"sampler": RandomOrderSampler(denoising_steps=4)},
        ),
    ],
    ids=["group", "negative", "policy", "none", "adaptive", "alpha 0", "wddo", "trajectory"],
)
def test_every_objective_raises_the_reward(tmp_path, objective, sampler):
    learns_slowly = isinstance(objective, WDCE) and objective.baseline == "none"
    dmpo = module(objective=objective, group_size=16, micro_batch_size=32, reward=share_of_ones, **sampler)
    run = trainer(tmp_path, max_steps=80 if learns_slowly else 24, gradient_clip_val=1.0)
    run.validate(dmpo, loader(6, shuffle=False), verbose=False)
    before = float(run.callback_metrics["val/sampled/reward"])
    run.fit(dmpo, loader())
    run.validate(dmpo, loader(6, shuffle=False), verbose=False)
    assert float(run.callback_metrics["val/sampled/reward"]) > before + 0.1


def share_of_ones(example, completion):
    return completion.count("1") / 8


def test_rollouts_without_signal_leave_the_gradient_as_it_is():
    """Skipping rows of zero signal is exact: the same loss and gradient as with all rows."""
    dmpo = module()
    batch = next(iter(loader()))
    from dmpo_lightning.rewards import Reward
    from dmpo_lightning.rollout import collect

    rollouts, _, _ = collect(
        dmpo.policy, dmpo.sampler, Reward(share_of_ones), batch, group_size=4, completion_length=8, seed=0, iteration=0
    )
    signal = torch.tensor([1.0, 0.0, -0.5, 0.0, 0.0, 0.0, 2.0, 0.0])

    def gradient(values, rows):
        loss, _ = dmpo.objective.loss(dmpo.policy, rows, {"signal": values}, iteration=0, planned_rollouts=8)
        return torch.autograd.grad(loss, dmpo.policy.model.model.transformer.ff_out.weight)[0]

    skipped = gradient(signal, rollouts.rows())
    kept = signal.nonzero().squeeze(-1)
    torch.testing.assert_close(skipped, gradient(signal[kept], rollouts.rows()[kept]), rtol=0, atol=0)
    tiny = torch.where(signal == 0, 1e-30, signal)  # not zero, so nothing is skipped
    torch.testing.assert_close(skipped, gradient(tiny, rollouts.rows()), rtol=1e-4, atol=1e-7)
