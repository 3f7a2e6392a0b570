import jaxtyping
import pytest
import torch
from scipy.stats import chisquare

from dmpo_lightning.functional import row_keys
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.samplers import ConfidenceSampler, Samples
from helpers import MASK, NEVER_SAMPLED, FixedLogits, prompt_batch, tiny_policy

LENGTH = 8


def sample(policy: Policy, sampler: ConfidenceSampler, prompts: list[str], length: int = LENGTH) -> Samples:
    batch = prompt_batch(policy, prompts)
    keys = row_keys(0, batch.prompt_index, group_size=1, buffer=0).squeeze(1)
    with evaluating(policy):
        return sampler.sample(policy, batch.prompt_ids, batch.prompt_mask, completion_length=length, keys=keys)


# The static schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize(
    ("block_length", "steps", "counts"),
    [
        (None, None, [1] * 8),
        (None, 3, [3, 3, 2]),
        (4, 8, [1] * 8),
        (4, 6, [2, 1, 1, 2, 1, 1]),
        (4, 2, [4, 4]),
        (2, 4, [2, 2, 2, 2]),
        (1, 8, [1] * 8),
    ],
)
def test_each_step_reveals_the_planned_number_of_positions(remasking, block_length, steps, counts):
    sampler = ConfidenceSampler(block_length=block_length, denoising_steps=steps, remasking=remasking)
    samples = sample(tiny_policy(with_reference=False), sampler, ["1", "22", "333"])
    for row in samples.reveal_step:
        assert row.bincount(minlength=len(counts)).tolist() == counts


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_blocks_are_finished_from_left_to_right(remasking):
    sampler = ConfidenceSampler(block_length=4, denoising_steps=6, remasking=remasking)
    revealed = sample(tiny_policy(with_reference=False), sampler, ["1", "22", "333"]).reveal_step
    assert (revealed[:, :4] < 3).all()
    assert (revealed[:, 4:] >= 3).all()


# Low-confidence remasking ---------------------------------------------------------------------------------------------


def plain_greedy(
    policy: Policy, prompt: list[int], *, block_length: int, steps_per_block: int
) -> tuple[list[int], list[int]]:
    """Low-confidence remasking of one row without padding, as LLaDA's paper describes it, in plain Python."""
    completion, revealed, step = [MASK] * LENGTH, [-1] * LENGTH, 0
    for start in range(0, LENGTH, block_length):
        left = block_length
        for steps_left in range(steps_per_block, 0, -1):
            count = -(-left // steps_left)
            logits = policy.model(torch.tensor([prompt + completion])).logits[0, len(prompt) :]
            candidates = []
            for place in range(start, start + block_length):
                if completion[place] == MASK:
                    scores = {token: logits[place, token] for token in range(32) if token not in NEVER_SAMPLED}
                    token = max(scores, key=scores.__getitem__)
                    confidence = 1 / sum(torch.exp(score - scores[token]) for score in scores.values())
                    candidates.append((-float(confidence), place, token))
            for _, place, token in sorted(candidates)[:count]:
                completion[place], revealed[place] = token, step
            left, step = left - count, step + 1
    return completion, revealed


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("block_length", "steps"), [(8, 8), (8, 3), (4, 6), (2, 4)])
def test_greedy_equals_plain_low_confidence_remasking(seed, block_length, steps):
    policy, prompts = tiny_policy(seed, with_reference=False), ["12", "1234", "3"]
    sampler = ConfidenceSampler(block_length=block_length, denoising_steps=steps, temperature=0.0)
    samples = sample(policy, sampler, prompts)
    batch = prompt_batch(policy, prompts)
    for row, (ids, mask) in enumerate(zip(batch.prompt_ids, batch.prompt_mask, strict=True)):
        steps_per_block = steps * block_length // LENGTH
        completion, revealed = plain_greedy(
            policy, ids[mask].tolist(), block_length=block_length, steps_per_block=steps_per_block
        )
        assert samples.completion_ids[row].tolist() == completion
        assert samples.reveal_step[row].tolist() == revealed


def test_positions_are_revealed_from_the_most_to_the_least_confident():
    table = torch.zeros(64, 32)
    prompt_length = prompt_batch(tiny_policy(with_reference=False), ["1"]).prompt_ids.shape[1]
    for place, strength in enumerate([1.0, 4.0, 2.0, 3.0]):
        table[prompt_length + place, 14 + place] = strength
    policy = tiny_policy(model=FixedLogits(table[: prompt_length + 4]), with_reference=False)
    samples = sample(policy, ConfidenceSampler(temperature=0.0), ["1"], length=4)
    assert samples.completion_ids.tolist() == [[14, 15, 16, 17]]
    assert samples.reveal_step.tolist() == [[3, 0, 2, 1]]


def test_equal_confidence_goes_from_left_to_right():
    policy = tiny_policy(model=FixedLogits(torch.arange(32.0)), with_reference=False)
    samples = sample(policy, ConfidenceSampler(temperature=0.0, denoising_steps=2), ["1"], length=4)
    assert samples.completion_ids.tolist() == [[24] * 4]
    assert samples.reveal_step.tolist() == [[0, 0, 1, 1]]


def test_confidence_is_the_probability_at_temperature_one_whatever_the_sampling_temperature():
    """At T = 0.05 both places are all but certain; at T = 1 the second is the surer one (.75 against .7)."""
    table = torch.full((64, 32), -1e9)
    prompt_length = prompt_batch(tiny_policy(with_reference=False), ["1"]).prompt_ids.shape[1]
    table[prompt_length, [14, 15]] = torch.tensor([0.7, 0.3]).log()
    table[prompt_length + 1, [16, 17, 18]] = torch.tensor([0.75, 0.2, 0.05]).log()
    policy = tiny_policy(model=FixedLogits(table[: prompt_length + 2]), with_reference=False)
    samples = sample(policy, ConfidenceSampler(temperature=0.05), ["1"], length=2)
    assert samples.completion_ids.tolist() == [[14, 16]]
    assert samples.reveal_step.tolist() == [[1, 0]]


@pytest.mark.parametrize(("confidence", "order"), [(None, [0, 1]), ("drawn", [0, 1]), ("model", [1, 0])])
def test_dream_ranks_tokens_by_the_probability_that_they_were_drawn_with(confidence, order):
    """At T = 0.05 both are all but certain, the first more so; at T = 1 the second one is (.52 to .51)."""
    table = torch.full((64, 32), -1e9)
    prompt_length = prompt_batch(tiny_policy(with_reference=False), ["1"]).prompt_ids.shape[1]
    table[prompt_length, 14:18] = torch.tensor([0.51, 0.17, 0.16, 0.16]).log()
    table[prompt_length + 1, 16:19] = torch.tensor([0.52, 0.3, 0.18]).log()
    model = FixedLogits(table[: prompt_length + 2])
    model.lookback = 1  # which is what tells Dream's shifted logits from others
    sampler = ConfidenceSampler(temperature=0.05, confidence=confidence)
    samples = sample(tiny_policy(model=model, with_reference=False), sampler, ["1"], length=2)
    assert samples.completion_ids.tolist() == [[14, 16]]
    assert samples.reveal_step.tolist() == [order]


def test_dream_cuts_by_top_p_before_top_k():
    logits = torch.full((32,), -1e9)
    logits[14:18] = torch.tensor([0.5, 0.3, 0.1, 0.1]).log()
    drawn = {}
    for lookback in (0, 1):
        model = FixedLogits(logits)
        model.lookback = lookback
        samples = sample(
            tiny_policy(model=model, with_reference=False), ConfidenceSampler(top_k=2, top_p=0.6), ["1"] * 9
        )
        drawn[lookback] = set(samples.completion_ids.flatten().tolist())
    assert drawn == {0: {14}, 1: {14, 15}}


def test_another_confidence_is_an_error(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it: annotations are not checked
    with pytest.raises(ValueError, match="`confidence` must be one of drawn, model, got 'whole'"):
        ConfidenceSampler(confidence="whole")


def test_candidates_that_are_not_kept_are_drawn_afresh():
    """Two places, tokens H (.7) and L (.3), one place per step; the surer candidate stays, at a tie the left one.

    First draws HH, HL and LL keep the left place, LH the right one; the other place is drawn again. So HH has
    .7 x .7 + .21 x .7 = .637, HL .7 x .3 = .21, LH .21 x .3 + .09 x .7 = .126, LL .09 x .3 = .027.
    """
    logits = torch.full((32,), -1e9)
    logits[[14, 15]] = torch.tensor([0.7, 0.3]).log()
    policy = tiny_policy(model=FixedLogits(logits), with_reference=False)
    drawn = sample(policy, ConfidenceSampler(), ["1"] * 4000, length=2).completion_ids - 14
    counts = (drawn[:, 0] * 2 + drawn[:, 1]).bincount(minlength=4).tolist()
    assert chisquare(counts, [4000 * share for share in (0.637, 0.21, 0.126, 0.027)]).pvalue > 1e-3


# Random remasking -----------------------------------------------------------------------------------------------------


def test_random_remasking_reveals_positions_in_a_uniform_order():
    policy = tiny_policy(model=FixedLogits(torch.zeros(32)), with_reference=False)
    samples = sample(policy, ConfidenceSampler(remasking="random"), ["1"] * 3000, length=3)
    orders = (samples.reveal_step * torch.tensor([9, 3, 1])).sum(-1)
    counts = orders.unique(return_counts=True)[1]
    assert len(counts) == 6
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_random_remasking_does_not_look_at_the_tokens():
    sampler = ConfidenceSampler(remasking="random", denoising_steps=4)
    flat = tiny_policy(model=FixedLogits(torch.zeros(32)), with_reference=False)
    assert torch.equal(
        sample(tiny_policy(with_reference=False), sampler, ["1", "22"]).reveal_step,
        sample(flat, sampler, ["1", "22"]).reveal_step,
    )


# Options --------------------------------------------------------------------------------------------------------------


def test_its_order_depends_on_the_tokens():
    assert not ConfidenceSampler().order_is_independent


def test_a_length_that_is_no_multiple_of_the_block_is_an_error():
    with pytest.raises(ValueError, match="`completion_length` must be a multiple of `block_length`, got 250 and 32"):
        ConfidenceSampler(block_length=32).validate(250)


@pytest.mark.parametrize("steps", [2, 6])
def test_steps_that_do_not_fit_the_blocks_are_an_error(steps):
    with pytest.raises(ValueError, match=rf"multiple of the number of blocks, 4 .*got {steps}"):
        ConfidenceSampler(block_length=4, denoising_steps=steps).validate(16)


@pytest.mark.parametrize(("block_length", "steps"), [(None, None), (None, 5), (4, None), (4, 4), (16, 7)])
def test_settings_that_fit_are_accepted(block_length, steps):
    ConfidenceSampler(block_length=block_length, denoising_steps=steps).validate(16)


def test_a_block_without_positions_is_an_error():
    with pytest.raises(ValueError, match="`block_length` must be at least 1, or null for one block, got 0"):
        ConfidenceSampler(block_length=0)


def test_an_unknown_remasking_is_an_error(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it: annotations are not checked
    with pytest.raises(ValueError, match="`remasking` must be one of low_confidence, random, sequential, got 'high'"):
        ConfidenceSampler(remasking="high")
