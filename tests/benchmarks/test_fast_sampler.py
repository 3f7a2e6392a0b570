"""The fast sampler draws the tokens of the published one, in every schedule and with every cache."""

from dataclasses import replace

import pytest
import torch
from benchmarks.plain import transfer_rows
from plain_policies import BLOCK, CACHES, LENGTH, plain, policy_of, prompts_of

from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.samplers import ConfidenceSampler, Samples
from dmpo_lightning.samplers.transfer import above_threshold, within_factor
from helpers import prompt_batch, tiny_policy
from small_models import bert_tokenizer, tiny_bert

VOCABULARY = 211
SCHEDULES = {"static": {"denoising_steps": 8}, "threshold": {"threshold": 0.5}, "factor": {"factor": 1.0}}


def fast(policy: Policy, prompts: tuple[torch.Tensor, torch.Tensor], **options) -> Samples:
    sampler = ConfidenceSampler(**({"block_length": BLOCK, "temperature": 0.0} | options))
    keys = torch.arange(len(prompts[0]))
    with evaluating(policy):
        return sampler.sample(policy, *prompts, completion_length=LENGTH, keys=keys)


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rows", [1, 2, 4, 16])
def test_greedy_tokens_are_those_of_the_published_algorithm(rows, schedule, cache):
    policy = policy_of(VOCABULARY, seed=rows, sharpness=2.0)
    for padded, same in ((False, False), (True, False), (False, True)):
        prompts = prompts_of(rows, VOCABULARY, padded=padded, same=same)
        options = {"denoising_steps": None, "threshold": None, "factor": None, "cache": cache} | SCHEDULES[schedule]
        expected = plain(policy, prompts, temperature=0.0, remasking="low_confidence", **options)
        found = fast(policy, prompts, cache=cache, **SCHEDULES[schedule])
        assert torch.equal(found.completion_ids, expected.completion_ids)


@torch.no_grad()
def test_caches_change_what_is_sampled_so_that_their_equality_means_something():
    policy, prompts = policy_of(VOCABULARY, sharpness=2.0), prompts_of(16, VOCABULARY, padded=False)
    found = [fast(policy, prompts, cache=cache).completion_ids for cache in CACHES]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
def test_at_every_temperature_a_completion_depends_neither_on_its_batch_nor_on_padding(cache):
    policy, prompts = policy_of(VOCABULARY), prompts_of(4, VOCABULARY, padded=True)
    together = fast(policy, prompts, cache=cache, threshold=0.3, temperature=0.7)
    last = prompts[0][3:, -3:], prompts[1][3:, -3:]
    with evaluating(policy):
        sampler = ConfidenceSampler(block_length=BLOCK, temperature=0.7, threshold=0.3, cache=cache)
        alone = sampler.sample(policy, *last, completion_length=LENGTH, keys=torch.tensor([3]))
    assert torch.equal(together.completion_ids[3:], alone.completion_ids)
    assert torch.equal(together.reveal_step[3:], alone.reveal_step)


def test_the_rows_of_a_step_are_chosen_as_the_published_loop_chooses_them():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        confidence = torch.rand(16, 32, generator=generator) ** 0.2
        masked = torch.rand(16, 32, generator=generator) < torch.rand(16, 1, generator=generator)
        masked[0], masked[1] = False, False
        masked[1, 7] = True
        rows = masked.any(1)
        found, expected = (
            (above_threshold(confidence, masked, 0.9), {"threshold": 0.9}),
            (within_factor(confidence, masked, 0.5), {"factor": 0.5}),
        )
        for chosen, rule in (found, expected):
            assert torch.equal(chosen[rows], transfer_rows(confidence[rows], masked[rows], **rule))
            assert not chosen[~rows].any()


def test_a_completion_that_ended_is_filled_with_end_tokens_without_being_computed():
    policy = tiny_policy(with_reference=False)
    batch = prompt_batch(policy, ["12", "1234", "3", "44 12"] * 8)
    prompts = batch.prompt_ids, batch.prompt_mask
    full = fast(policy, prompts, temperature=1.0)
    early = fast(policy, prompts, temperature=1.0, early_exit=True)
    ends = torch.tensor(policy.facts.end_token_ids)
    over = torch.isin(full.completion_ids[:, :BLOCK], ends).any(1)
    assert over.any()
    assert not over.all()
    assert torch.equal(early.completion_ids[~over], full.completion_ids[~over])
    assert torch.equal(early.completion_ids[:, :BLOCK], full.completion_ids[:, :BLOCK])
    assert (early.completion_ids[over, BLOCK:] == ends[0]).all()
    assert ((early.reveal_step < 0).any(1) == over).all()


def test_an_early_exit_of_a_policy_without_end_tokens_changes_nothing():
    policy = tiny_policy(with_reference=False)
    policy.facts = replace(policy.facts, end_token_ids=())
    batch = prompt_batch(policy, ["12", "1234"])
    prompts = batch.prompt_ids, batch.prompt_mask
    assert torch.equal(fast(policy, prompts, early_exit=True).completion_ids, fast(policy, prompts).completion_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.9, "factor": 1.0}, "not both"),
        ({"threshold": 0.0}, "`threshold` must be a probability"),
        ({"factor": 0.0}, "`factor` must be positive"),
        ({"factor": 0.9, "denoising_steps": 8}, "leave out denoising_steps"),
        ({"editing_threshold": 0.9}, "needs `threshold` as well"),
    ],
)
def test_options_that_do_not_fit_together_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ConfidenceSampler(**options)


@pytest.mark.parametrize("options", [{"denoising_steps": 8}, {"editing_threshold": 0.9}])
def test_a_schedule_beside_a_threshold_and_editing_are_for_block_causal_models(options):
    with pytest.raises(ValueError, match="are for block-causal backbones"):
        ConfidenceSampler(threshold=0.9, **options).validate_policy(tiny_policy(with_reference=False))


def test_a_cache_needs_a_native_backbone():
    policy = Policy(tiny_bert(), bert_tokenizer(), with_reference=False)
    with pytest.raises(ValueError, match="`cache` dual needs a native bidirectional backbone"):
        fast(policy, (torch.tensor([[6, 7]]), torch.ones(1, 2, dtype=torch.bool)), cache="dual")
