"""Guards in real runs: each is provoked, a healthy run is left alone, and a restart changes nothing."""

import warnings
from pathlib import Path

import pytest
import torch
from dmpo_runs import TOKENIZER, SaveAt, digit_share, module, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint

from dmpo_lightning import WDCE, ConfidenceSampler, Guards, PromptLoader, RunRecorder
from dmpo_lightning.reports.lines import read_lines

ROWS = [{"prompt": f"{i:04d}", "digit": str(i % 10)} for i in range(100)]
UNBOUNDED = WDCE(
    reward_temperature=0.1,
    replicates=2,
    baseline="negative",
    negative_term="log_likelihood",
    uninformative_groups="train",
)
COLLAPSE = {"reward_drop", "entropy", "repetition", "log_rnd"}
"""What a policy that writes one token for ever shows, if its reward is `variety`."""


def variety(example, completion):
    return len(set(completion)) / 8


def value_of_text(example, completion):
    """Differs between nearly all texts."""
    return sum(ord(character) * (place + 1) for place, character in enumerate(completion)) % 97 / 97


def prompts(batch_size):
    return PromptLoader(ROWS, TOKENIZER, batch_size=batch_size)


def run(tmp_path, guards, *, steps, rate=1e-3, callbacks=(), ckpt_path=None, flags=None, groups=50, **options):
    """One optimizer step for each buffer of 50 groups."""
    options = {
        "group_size": 2,
        "micro_batch_size": 2 * groups,
        "num_iterations": 1,
        "sampler": ConfidenceSampler(denoising_steps=2),
        "validation_samplers": {"greedy": ConfidenceSampler(temperature=0.0, denoising_steps=1)},
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=rate),
        **options,
    }
    dmpo = module(**options)
    saves = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    flags = {
        "max_steps": steps,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "enable_checkpointing": saves,
        **(flags or {}),
    }
    fitted = trainer(tmp_path, callbacks=[guards, RunRecorder(), *callbacks], **flags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted.fit(dmpo, prompts(groups), prompts(4), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return dmpo, fitted


def names(guards):
    return {event["name"] for event in guards.events}


def only(**thresholds):
    """All other guards are switched off."""
    return Guards(**(dict.fromkeys(Guards().thresholds) | thresholds), window=2)


def written(folder):
    """What the record of the run says that guards have said."""
    named = ("step", "buffer", "name", "value", "message")
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "guard"]
    return [{name: line[name] for name in named} for line in lines]


def test_a_healthy_run_is_left_alone(tmp_path):
    # Random weights fill eight tokens nearly always.
    guards = Guards(window=2, truncated=None)
    run(tmp_path, guards, steps=5, group_size=4, micro_batch_size=200)
    assert guards.events == []
    assert written(tmp_path) == []


def test_a_destroyed_policy_is_seen_by_all_guards_of_collapse_once_and_written_down(tmp_path):
    guards = Guards(window=2)
    run(tmp_path, guards, steps=5, rate=10.0, reward=variety, objective=UNBOUNDED)
    assert names(guards) >= COLLAPSE
    assert len(names(guards)) == len(guards.events)
    assert written(tmp_path) == guards.events
    assert all(set(event) == {"step", "buffer", "name", "value", "message"} for event in guards.events)


def test_rewards_that_are_all_the_same_are_told(tmp_path):
    guards = only(informative_groups=0.01)
    run(tmp_path, guards, steps=4, reward=lambda example, completion: 1.0)
    # Once, although it stays so.
    assert [(event["name"], event["buffer"]) for event in guards.events] == [("informative_groups", 1)]
    assert "too hard or too easy" in guards.events[0]["message"]


def test_greedy_rollouts_are_told_by_groups_without_information(tmp_path):
    """All completions of a prompt are the same, and so are their rewards."""
    guards = only(informative_groups=0.01)
    run(tmp_path, guards, steps=3, sampler=ConfidenceSampler(temperature=0.0, denoising_steps=2))
    assert names(guards) == {"informative_groups"}


def test_one_rollout_with_all_the_weight_is_told(tmp_path):
    guards = only(effective_rollouts=1.1)
    run(tmp_path, guards, steps=3, reward=value_of_text, objective=WDCE(reward_temperature=1e-4, replicates=2))
    assert names(guards) == {"effective_rollouts"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guard", "reward"),
    [
        ("empty", lambda example, completion: -len(completion)),
        ("truncated", lambda example, completion: len(completion)),
        ("repetition", lambda example, completion: -len(set(completion)) if completion else -8),
    ],
)
def test_a_reward_that_asks_for_degenerate_completions_is_found_out(tmp_path, guard, reward):
    # Of eight tokens that are all the same, four of the five 4-grams repeat.
    guards = Guards(window=2, repetition=0.25)
    objective = WDCE(reward_temperature=0.5, replicates=2, prompt_weight="reward", baseline_scale=0.5)
    options = {"group_size": 4, "micro_batch_size": 200, "objective": objective}
    run(tmp_path, guards, steps=40, rate=3e-3, reward=reward, **options)
    assert guard in names(guards)


@pytest.mark.parametrize("batch", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_restart_within_a_step_or_behind_one_changes_neither_guards_nor_weights(tmp_path, batch):
    """Two batches a step and a buffer: the fifth and sixth are those of the third."""
    options = {"steps": 6, "rate": 10.0, "reward": variety, "micro_batch_size": 50}
    flags = {"accumulate_grad_batches": 2}
    whole, saved = Guards(window=2), tmp_path / "a.ckpt"
    first, _ = run(tmp_path, whole, callbacks=[SaveAt(batch, saved)], flags=flags, **options)
    again = Guards(window=2)
    assert written(tmp_path) == whole.events
    second, _ = run(tmp_path, again, ckpt_path=saved, flags=flags, **options)
    steps = [event["step"] for event in whole.events]
    assert min(steps) == 2 < max(steps), "said before the checkpoint and behind it"
    assert again.state_dict() == whole.state_dict()
    assert written(tmp_path) == whole.events
    assert torch.equal(weights(first), weights(second))


def test_a_second_run_starts_anew(tmp_path):
    guards = only(informative_groups=0.01)
    for _ in range(2):
        run(tmp_path, guards, steps=3, sampler=ConfidenceSampler(temperature=0.0, denoising_steps=1))
        assert len(guards.events) == 1


@pytest.mark.parametrize("options", [{"entropy": -0.1}, {"log_rnd": float("nan")}, {"window": 0}])
def test_thresholds_out_of_range_are_errors_at_construction(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be at least"):
        Guards(**options)


def test_every_metric_of_a_run_is_explained(tmp_path):
    _, fitted = run(tmp_path, Guards(), steps=1, reward=digit_share)
    explained = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    logged = {name for name in fitted.callback_metrics if "/" in name}
    assert {"policy/entropy", "gradient/norm", "completion/repetition"} <= logged
    assert {name for name in logged - {"reward/reward"} if f"`{name}`" not in explained} == set()
