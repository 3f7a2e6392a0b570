"""Objectives train a block-causal model unchanged."""

import math

import pytest
import torch
from dmpo_runs import TOKENIZER, SaveAt, loader, small_dmpo, trainer, weights
from transformers import LlamaConfig, LlamaForCausalLM

from dmpo_lightning import WDCE, WDDO, ConfidenceSampler, LoRA, TrajectoryEstimator
from dmpo_lightning.checkpoints.export import save_policy
from dmpo_lightning.functional import Purpose, block_weights, elbo_replicates, fold_in
from dmpo_lightning.models.adapting import adapt
from dmpo_lightning.objectives import ElboEstimator, TraceRL
from dmpo_lightning.objectives.estimators import masked_log_probs
from dmpo_lightning.policy import evaluating
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rollout import Sampling, collect
from small_models import SMALL, tiny_llada2, tiny_sdar


def share_of_ones(example, completion):
    return completion.count("1") / 8


def share_of_digits(example, completion):
    """Rollouts of a fresh model often have some, so that there is something to learn from in every buffer."""
    return sum(token in "1234" for token in completion) / 8


def block_causal(objective, *, model=None, **options):
    """Blocks of four, behind prompts of which some end inside a block, and steps by which it learns soon."""
    defaults = {
        "tokenizer": TOKENIZER,
        "sampler": ConfidenceSampler(),
        "objective": objective,
        "reward": share_of_ones,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    }
    return small_dmpo(model or tiny_sdar(initializer_range=0.1), **{**defaults, **options})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        (WDCE(reward_temperature=0.03, replicates=4), ConfidenceSampler()),
        (WDDO(reward_temperature=0.03, replicates=4), ConfidenceSampler()),
        (
            WDCE(reward_temperature=0.03, replicates=4, baseline="negative", estimator=TrajectoryEstimator()),
            ConfidenceSampler(remasking="sequential"),
        ),
        (WDCE(reward_temperature=0.03, replicates=4, baseline="policy"), ConfidenceSampler(threshold=0.5)),
    ],
    ids=["group", "wddo", "negative, trajectory", "policy, threshold"],
)
def test_every_objective_raises_the_reward_of_a_block_causal_model(tmp_path, objective, sampler):
    # At a reward temperature at which the target, which is tilted from a reference that says few digits, has many.
    options = {"group_size": 16, "micro_batch_size": 32, "completions_per_prompt": 16, "reward": share_of_digits}
    dmpo = block_causal(objective, sampler=sampler, **options)
    run = trainer(tmp_path, max_steps=24, gradient_clip_val=1.0)
    run.validate(dmpo, loader(6, shuffle=False), verbose=False)
    before = float(run.callback_metrics["val/sampled/reward"])
    run.fit(dmpo, loader())
    run.validate(dmpo, loader(6, shuffle=False), verbose=False)
    assert float(run.callback_metrics["val/sampled/reward"]) > before + 0.3


@pytest.mark.parametrize("block_size", [None, 4])
def test_an_adapted_causal_model_trains(tmp_path, block_size):
    """A Llama of transformers, written and read again, with the shift that it was made with."""
    llama = LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=64, initializer_range=0.1))
    save_policy(llama, TOKENIZER, llama.state_dict(), tmp_path / "causal")
    adapted = adapt(str(tmp_path / "causal"), block_size=block_size)
    before = {name: weight.clone() for name, weight in adapted.model.state_dict().items()}
    dmpo = block_causal(WDCE(reward_temperature=0.03, replicates=2), model=adapted.model, reward=share_of_digits)
    run = trainer(tmp_path, max_steps=2)
    run.fit(dmpo, loader())
    assert all(torch.isfinite(weight).all() for weight in adapted.model.state_dict().values())
    assert any((weight != before[name]).any() for name, weight in adapted.model.state_dict().items())


def test_a_mixture_of_experts_logs_its_routing_and_resumes_bit_for_bit(tmp_path):
    def fit(**options):
        dmpo = block_causal(
            WDCE(reward_temperature=0.03, replicates=2),
            model=tiny_llada2(initializer_range=0.1),
            validation_samplers={"greedy": ConfidenceSampler(temperature=0.0)},
        )
        run = trainer(tmp_path, max_steps=6, callbacks=[SaveAt(2, tmp_path / "mid.ckpt")])
        run.fit(dmpo, loader(), **options)
        return dmpo, run

    whole, run = fit()
    resumed, again = fit(ckpt_path=tmp_path / "mid.ckpt")
    assert torch.equal(weights(whole), weights(resumed))
    logged = {name: float(value) for name, value in run.logged_metrics.items() if name.startswith("routing/")}
    # Of one layer with experts, eight, of which each token gets three.
    assert math.log(3) / math.log(8) < logged["routing/entropy"] == logged["routing/lowest_entropy"] <= 1
    assert 1 / 8 <= logged["routing/busiest_expert"] <= 1 / 3 + 1e-6
    assert {name: float(value) for name, value in again.logged_metrics.items() if name in logged} == logged


def test_routing_is_also_that_of_a_merged_copy(tmp_path):
    objective, model = WDCE(reward_temperature=0.03), tiny_llada2(initializer_range=0.1)
    dmpo = block_causal(objective, model=model, adapter=LoRA(r=2), sample_merged=True)
    run = trainer(tmp_path, max_steps=1)
    run.fit(dmpo, loader())
    assert run.logged_metrics["routing/entropy"] > 0


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (TraceRL(), "leave out `editing_threshold`"),
        (WDCE(reward_temperature=0.1, estimator=TrajectoryEstimator()), "Trajectory log-probs need"),
    ],
)
def test_an_order_that_editing_does_not_keep_is_not_trained_along(objective, said):
    sampler = ConfidenceSampler(threshold=0.95, editing_threshold=0.9)
    with pytest.raises(ValueError, match=said):
        block_causal(objective, model=tiny_llada2(), sampler=sampler)
    block_causal(WDCE(reward_temperature=0.1), model=tiny_llada2(), sampler=sampler)


def rollouts_of(dmpo):
    return collect(dmpo.policy, Reward(share_of_ones), next(iter(loader())), Sampling(dmpo.sampler, 8, 4))


def test_at_the_behaviour_policy_wddo_knows_no_ratio():
    """D is 0 on the masks that both sides share, so that the loss is 2 / (beta L) (w + 1) log 2 with w of mean 1."""
    objective = WDDO(reward_temperature=0.1, replicates=2)
    dmpo = block_causal(objective)
    rollouts = rollouts_of(dmpo)
    with evaluating(dmpo.policy):
        targets, _ = objective.prepare(dmpo.policy, rollouts, rows_per_forward=3)
        rows = {name: value.flatten(0, 1) for name, value in targets.items()}
        loss, _ = objective.loss(dmpo.policy, rollouts.rows(), rows, iteration=0, planned_rollouts=8)
    assert loss.item() == pytest.approx(2 / 8 * 2 * math.log(2), rel=1e-4)


@pytest.mark.parametrize("negative_term", ["log_likelihood", "likelihood"])
def test_the_loss_of_wdce_is_the_elbo_per_token_that_was_drawn(negative_term):
    """Of each rollout, on masks with a count for each block; what stands behind its end does not count. A negative
    rollout's likelihood is the same mean of p.
    """
    objective = WDCE(reward_temperature=0.1, replicates=2, weight_tolerance=0.0, negative_term=negative_term)
    dmpo = block_causal(objective)
    dmpo.policy._ban[list(dmpo.policy.facts.end_token_ids)] = 1.0  # which makes ends more likely
    rollouts = rollouts_of(dmpo)
    rows = rollouts.rows()
    assert (rows.reveal_step < 0).any()
    blocks = dmpo.policy.completion_blocks(rows.prompt_mask, rows.completion_ids)
    assert torch.equal(blocks < 0, rows.reveal_step < 0)
    signal = torch.linspace(-1, 1, len(rows))
    with evaluating(dmpo.policy):
        loss, _ = objective.loss(dmpo.policy, rows, {"signal": signal}, iteration=0, planned_rollouts=8)
        keys = fold_in(fold_in(rows.keys, Purpose.LOSS), 0)
        log_prob, masks, _ = masked_log_probs(dmpo.policy, rows, keys, replicates=2, antithetic=True)
    assert not (masks & (blocks < 0)[:, None]).any()
    counted = (blocks >= 0).sum(-1)
    up = -elbo_replicates(log_prob, masks, blocks).mean(-1) / counted
    likelihood = (log_prob.exp() * block_weights(masks, blocks)).sum(-1).mean(-1) / counted
    down = likelihood if negative_term == "likelihood" else -up
    expected = (signal.abs() * torch.where(signal > 0, up, down)).sum() / 8
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)


def test_log_rnd_is_zero_between_equal_policies_and_not_between_others():
    dmpo = block_causal(WDCE(reward_temperature=0.1, replicates=2))
    rollouts, estimator = rollouts_of(dmpo), ElboEstimator(2)
    with evaluating(dmpo.policy):
        assert estimator.log_rnd(dmpo.policy, rollouts, rows_per_forward=8).abs().max() < 1e-5
        dmpo.policy.model.model.layers[0].mlp.down_proj.weight.add_(0.1)
        assert estimator.log_rnd(dmpo.policy, rollouts, rows_per_forward=8).abs().max() > 1e-3


def test_completions_of_other_lengths_are_evaluated(tmp_path):
    """Shorter and longer than those of training, and no multiples of the block."""
    lengths = [8, 21, 40]
    dmpo = block_causal(WDCE(reward_temperature=0.1, replicates=2), evaluation_lengths=lengths)
    run = trainer(tmp_path)
    run.validate(dmpo, loader(6, shuffle=False), verbose=False)
    effective = [float(run.callback_metrics[f"val/sampled/{length}/effective_length"]) for length in lengths]
    assert all(0 < found <= length for found, length in zip(effective, lengths, strict=True))
