"""Training does what the mathematics promises, through the real module."""

import math

import pytest
import torch
from dmpo_runs import loader, module, trainer, weights

from dmpo_lightning import WDCE, WDDO, RandomOrderSampler, TrajectoryEstimator
from dmpo_lightning.functional import Purpose, draw_masks, fold_in
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rollout import Sampling, collect


def constant_reward(example, completion):
    return 1.0


def test_groups_of_equal_reward_give_exactly_no_gradient_under_the_negative_baseline(tmp_path):
    dmpo = module(reward=constant_reward, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    before = weights(dmpo).clone()
    trainer(tmp_path, max_steps=4).fit(dmpo, loader())
    assert torch.equal(weights(dmpo), before)


@pytest.mark.parametrize("negative_term", ["likelihood", "log_likelihood"])
@pytest.mark.parametrize("baseline", ["none", "group", "negative", "policy"])
def test_uninformative_groups_have_exactly_no_signal_under_any_baseline(baseline, negative_term):
    dmpo = module()
    rollouts = rollouts_of(dmpo, next(iter(loader())))
    rollouts.scores.total = torch.tensor([[0.3, 0.3, 0.3, 0.3], [0.0, 1.0, 0.0, 0.0]])
    objective = WDCE(
        reward_temperature=0.2,
        replicates=2,
        baseline=baseline,
        negative_term=negative_term,
        uninformative_groups="skip",
        weight_tolerance=0.0,
    )
    # The reference has moved away, so that no baseline is zero by itself.
    with torch.no_grad():
        dmpo.policy.model.model.transformer.ff_out.weight.mul_(1.5)
        targets, _ = objective.prepare(dmpo.policy, rollouts, rows_per_forward=8)
        dmpo.policy.model.model.transformer.ff_out.weight.mul_(1.5)
        objective.before_step(dmpo.policy, rollouts, targets, slice(None), rows_per_forward=8)
    assert targets["weight"][0].std() > 0
    assert torch.equal(targets["signal"][0], torch.zeros(4))
    assert (targets["signal"][1] != 0).all()
    flat = {name: value.flatten(0, 1) for name, value in targets.items()}
    loss, diagnostics = objective.loss(dmpo.policy, rollouts.rows(), flat, iteration=0, planned_rollouts=8)
    assert loss.isfinite()
    assert diagnostics["weight/skipped_rollouts"] == 0.5


PUBLISHED_BASELINES = {
    "none": lambda exponent, reward: torch.zeros_like(exponent),
    "group": lambda exponent, reward: torch.ones_like(exponent),
    "negative": lambda exponent, reward: 4 * (exponent - 2 * reward / 0.2).softmax(-1),
    "policy": lambda exponent, reward: torch.ones_like(exponent),  # at theta = old
}


@pytest.mark.parametrize("baseline", PUBLISHED_BASELINES)
def test_the_published_form_is_its_formula_and_nothing_else(baseline):
    """To the last bit from the signal on, so that other forms cost the published one nothing."""
    dmpo = module()
    rollouts = rollouts_of(dmpo, next(iter(loader())))
    rollouts.scores.total = torch.tensor([[0.0, 0.3, 0.1, 0.6], [0.0, 1.0, 0.2, 0.0]])
    with torch.no_grad():
        dmpo.policy.model.model.transformer.ff_out.weight.mul_(1.5)
    form = {"negative_term": "log_likelihood", "uninformative_groups": "train", "weight_tolerance": 0.0}
    objective = WDCE(reward_temperature=0.2, replicates=2, baseline=baseline, **form)
    targets, _ = objective.prepare(dmpo.policy, rollouts, rows_per_forward=8)
    exponent = targets["log_rnd"] + rollouts.reward / 0.2
    signal = 4 * exponent.softmax(-1) - PUBLISHED_BASELINES[baseline](exponent, rollouts.reward)
    torch.testing.assert_close(targets["signal"], signal)
    rows, signal = rollouts.rows(), targets["signal"].detach().flatten()
    masks = draw_masks(fold_in(fold_in(rows.keys, Purpose.LOSS), 3), length=8, replicates=2, antithetic=True)
    log_prob = dmpo.policy.completion_log_probs(
        rows.prompt_ids, rows.prompt_mask, rows.completion_ids, masks, at=masks
    ).float()
    cross_entropy = -((log_prob.masked_fill(~masks, 0).sum(-1) / masks.sum(-1)).mean(-1))
    expected = (signal * cross_entropy).sum() / 8
    flat = {name: value.flatten(0, 1) for name, value in targets.items()}
    loss, _ = objective.loss(dmpo.policy, rows, flat, iteration=3, planned_rollouts=8)
    head = dmpo.policy.model.model.transformer.ff_out.weight
    assert torch.equal(loss, expected)
    assert torch.equal(torch.autograd.grad(loss, head)[0], torch.autograd.grad(expected, head)[0])


def signal_of(dmpo, reward, **options):
    rollouts = rollouts_of(dmpo, next(iter(loader())))
    rollouts.scores.total = torch.tensor(reward)
    targets, _ = WDCE(**options).prepare(dmpo.policy, rollouts, rows_per_forward=8)
    return targets["weight"], targets["signal"]


def test_prompts_weighed_by_reward_share_one_partition_function():
    """Where the reference is the policy, weights are exp(r / alpha) over its mean in the buffer: alpha is 1 / log 3."""
    reward = [[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    options = {"reward_temperature": 1 / math.log(3), "prompt_weight": "reward"}
    # Six of 3 and two of 1: the mean is 20 / 8 = 2.5.
    expected = torch.tensor([[0.4, 1.2, 1.2, 0.4], [1.2] * 4])
    weights_, signal = signal_of(module(), reward, **options, baseline_scale=0.5)
    torch.testing.assert_close(weights_, expected)
    torch.testing.assert_close(signal, expected - 0.5)
    _, signal = signal_of(module(), reward, **options, uninformative_groups="skip")
    torch.testing.assert_close(signal[0], expected[0] - 1)
    assert torch.equal(signal[1], torch.zeros(4))


def test_weighed_by_reward_a_group_that_is_all_wrong_is_not_imitated():
    reward = [[0.0] * 4, [1.0] * 4]
    options = {"reward_temperature": 0.05, "baseline": "none", "uninformative_groups": "train"}
    assert torch.equal(signal_of(module(), reward, **options)[1], torch.ones(2, 4))
    signal = signal_of(module(), reward, **options, prompt_weight="reward")[1]
    torch.testing.assert_close(signal, torch.tensor([[2 * math.exp(-20)] * 4, [2.0] * 4]), rtol=1e-4, atol=0)


def test_weighed_by_reward_numbers_stay_finite_where_a_prompt_weighs_nothing():
    dmpo = module()
    rollouts = rollouts_of(dmpo, next(iter(loader())))
    rollouts.scores.total = torch.tensor([[0.0] * 4, [1.0, 0.0, 1.0, 1.0]])
    objective = WDCE(reward_temperature=0.001, prompt_weight="reward")
    targets, diagnostics = objective.prepare(dmpo.policy, rollouts, rows_per_forward=8)
    assert torch.equal(targets["weight"][0], torch.zeros(4))
    torch.testing.assert_close(targets["weight"][1], torch.tensor([1.0, 0.0, 1.0, 1.0]) * 8 / 3)
    torch.testing.assert_close(diagnostics["weight/ess"], torch.tensor((1 + 3 / 4) / 2))


def test_the_target_of_a_prompt_is_the_same_whatever_it_weighs():
    dmpo = module()
    with torch.no_grad():
        dmpo.policy.model.model.transformer.ff_out.weight.mul_(1.5)
    reward = torch.rand(2, 4, generator=torch.Generator().manual_seed(0)).tolist()
    group, _ = signal_of(dmpo, reward, reward_temperature=0.2)
    weighed, _ = signal_of(dmpo, reward, reward_temperature=0.2, prompt_weight="reward")
    torch.testing.assert_close(weighed / weighed.sum(-1, keepdim=True), group / 4)
    torch.testing.assert_close(weighed.mean(), torch.ones(()))
    assert weighed.sum(-1).std() > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"baseline_scale": -0.5}, "`baseline_scale` must be finite and at least 0, got -0.5"),
        ({"baseline_scale": math.nan}, "`baseline_scale` must be finite"),
    ],
)
def test_scales_of_the_baseline_that_cannot_be_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        WDCE(reward_temperature=0.1, **options)


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        pytest.param(
            WDCE(reward_temperature=0.2, replicates=4, baseline="group", negative_term="log_likelihood"),
            {},
            marks=pytest.mark.slow,
        ),
        pytest.param(WDCE(reward_temperature=0.2, replicates=4), {}, marks=pytest.mark.slow),
        pytest.param(WDCE(reward_temperature=0.2, replicates=4, baseline="negative"), {}, marks=pytest.mark.slow),
        pytest.param(WDCE(reward_temperature=0.2, replicates=4, baseline="policy"), {}, marks=pytest.mark.slow),
        pytest.param(WDCE(reward_temperature=0.03, replicates=4, baseline="none"), {}, marks=pytest.mark.slow),
        pytest.param(WDDO(reward_temperature=0.2, replicates=4), {}, marks=pytest.mark.slow),
        pytest.param(
            WDCE(reward_temperature=0.2, replicates=4, baseline="group", estimator=TrajectoryEstimator()),
            {"sampler": RandomOrderSampler(denoising_steps=4)},
            marks=pytest.mark.slow,
        ),
        (WDCE(reward_temperature=0.2, replicates=4, prompt_weight="reward", baseline_scale=0.5), {}),
    ],
    ids=[
        "group",
        "likelihood",
        "negative",
        "policy",
        "none",
        "wddo",
        "trajectory",
        "prompts by reward",
    ],
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


def rollouts_of(dmpo, batch, *, group_size=4, completion_length=8):
    sampling = Sampling(dmpo.sampler, completion_length, group_size)
    return collect(dmpo.policy, Reward(share_of_ones), batch, sampling)


def gradient(dmpo, objective, rows, signal, planned=8):
    """Of the loss with respect to the head, and its diagnostics."""
    loss, diagnostics = objective.loss(dmpo.policy, rows, {"signal": signal}, iteration=0, planned_rollouts=planned)
    return torch.autograd.grad(loss, dmpo.policy.model.model.transformer.ff_out.weight)[0], diagnostics


def test_rollouts_without_signal_leave_the_gradient_as_it_is():
    """Skipping rows of zero signal is exact: the same loss and gradient as with all rows."""
    dmpo = module()
    exact = WDCE(reward_temperature=0.1, replicates=2, weight_tolerance=0.0)
    rows = rollouts_of(dmpo, next(iter(loader()))).rows()
    signal = torch.tensor([1.0, 0.0, -0.5, 0.0, 0.0, 0.0, 2.0, 0.0])
    skipped, diagnostics = gradient(dmpo, exact, rows, signal)
    kept = signal.nonzero().squeeze(-1)
    alone, _ = gradient(dmpo, exact, rows[kept], signal[kept])
    torch.testing.assert_close(skipped, alone, rtol=0, atol=0)
    tiny = torch.where(signal == 0, 1e-30, signal)  # not zero, so nothing is skipped
    whole, nothing = gradient(dmpo, exact, rows, tiny)
    torch.testing.assert_close(skipped, whole, rtol=1e-4, atol=1e-7)
    assert (diagnostics["weight/skipped_rollouts"], nothing["weight/skipped_rollouts"]) == (5 / 8, 0)
    assert diagnostics["weight/dropped_mass"] == 0


def test_negligible_rollouts_are_dropped_and_their_mass_is_logged():
    dmpo = module()
    rows = rollouts_of(dmpo, next(iter(loader()))).rows()
    signal = torch.tensor([1.0, 4e-4, -0.5, -3e-4, 0.0, 0.0, 2.0, 1e-2])
    whole, _ = gradient(dmpo, WDCE(reward_temperature=0.1, replicates=2, weight_tolerance=0.0), rows, signal)
    found, diagnostics = gradient(dmpo, WDCE(reward_temperature=0.1, replicates=2, weight_tolerance=1e-3), rows, signal)
    assert diagnostics["weight/skipped_rollouts"] == 4 / 8
    assert float(diagnostics["weight/dropped_mass"]) == pytest.approx(7e-4 / 3.5107, rel=1e-3)
    assert 0 < (found - whole).norm() / whole.norm() < 2e-3


def test_one_rollout_stays_where_none_has_a_signal():
    dmpo = module()
    rows = rollouts_of(dmpo, next(iter(loader()))).rows()
    found, diagnostics = gradient(dmpo, dmpo.objective, rows, torch.zeros(8))
    assert found.abs().max() == 0
    assert diagnostics["weight/skipped_rollouts"] == 7 / 8


@pytest.mark.parametrize("baseline", ["none", "group", "policy"])
def test_merging_identical_completions_leaves_the_gradient_as_it_is(baseline):
    """To rounding in completions of one token, of which there is one masking only, and in fewer rows."""
    dmpo = module()
    rollouts = rollouts_of(dmpo, next(iter(loader())))
    one, other = rollouts.completion_ids.unique()[:2]
    rollouts.completion_ids = torch.stack((one, one, other, one, other, other, one, other)).view(2, 4, 1)
    for name in ("reveal_step", "sampled_log_prob"):
        setattr(rollouts, name, getattr(rollouts, name)[..., :1])
    rollouts.scores.total = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.2, 0.2, 0.5, 0.2]])
    found = []
    for merge_identical in (False, True):
        objective = WDCE(
            reward_temperature=0.5, replicates=2, antithetic=False, baseline=baseline, merge_identical=merge_identical
        )
        targets, _ = objective.prepare(dmpo.policy, rollouts, rows_per_forward=8)
        objective.before_step(dmpo.policy, rollouts, targets, slice(None), rows_per_forward=8)
        signal = targets["signal"]
        found.append(gradient(dmpo, objective, rollouts.rows(), signal.flatten()))
    (whole, _), (merged, diagnostics) = found
    assert diagnostics["weight/skipped_rollouts"] >= 0.5
    assert whole.norm() > 0
    torch.testing.assert_close(merged, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("weight_tolerance", -0.1), ("weight_tolerance", 1.0)])
def test_values_outside_their_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        WDCE(reward_temperature=0.1, **{name: value})


def test_a_trajectory_is_the_same_however_many_steps_a_forward_replays():
    dmpo = module(sampler=RandomOrderSampler(denoising_steps=4))
    rollouts = rollouts_of(dmpo, next(iter(loader())))
    found = [
        TrajectoryEstimator(steps).log_prob(dmpo.policy, rollouts, rows_per_forward=3).detach()
        for steps in (1, 3, 4, 99)
    ]
    for each in found:
        torch.testing.assert_close(each, rollouts.sampled_log_prob.sum(-1), rtol=1e-4, atol=1e-4)


def test_a_forward_needs_a_step():
    with pytest.raises(ValueError, match="`steps_per_forward` must be at least 1, got 0"):
        TrajectoryEstimator(0)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_a_beta_that_is_no_positive_number_is_an_error(beta):
    with pytest.raises(ValueError, match=f"`beta` must be positive and finite, got {beta}"):
        WDDO(reward_temperature=0.1, beta=beta)


class Older(WDCE):
    """Of another signature than `DMPO` calls."""

    def validate(self, *, completion_length):
        raise NotImplementedError


def test_an_objective_of_another_signature_is_named_at_construction():
    with pytest.raises(ValueError, match=r"`objective` needs validate\(\*, group_size, sampler\), got .*group_size"):
        module(objective=Older(reward_temperature=0.1))
