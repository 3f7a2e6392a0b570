"""What holds for every sampler."""

import math

import pytest
import torch
from scipy.stats import chisquare

from dmpo_lightning import TrajectoryEstimator
from dmpo_lightning.functional import row_keys
from dmpo_lightning.policy import evaluating, full_attention_mask
from dmpo_lightning.samplers import (
    Canvas,
    ConfidenceSampler,
    RandomOrderSampler,
    Sampler,
    Samples,
    WinoSampler,
)
from dmpo_lightning.samplers.base import reveal_counts
from helpers import MASK, NEVER_SAMPLED, FixedLogits, pad_more, prompt_batch, tiny_policy

LENGTH = 8


class LeftToRight(Sampler):
    """A sampler of somebody's own, made of public names alone."""

    order_is_independent = True

    def sample(self, policy, prompt_ids, prompt_mask, *, completion_length, keys):
        canvas = Canvas.blank(policy, prompt_ids, prompt_mask, completion_length, keys)
        for step in range(completion_length):
            at = torch.full((len(keys), 1), step)
            canvas.reveal(at, canvas.draw(canvas.logits(at), at, step, self), step)
        return canvas.samples()


SAMPLERS = {
    "confidence": ConfidenceSampler(block_length=4, denoising_steps=6, temperature=1.0),
    "confidence greedy": ConfidenceSampler(block_length=4, denoising_steps=4, temperature=0.0),
    "random remasking": ConfidenceSampler(remasking="random", denoising_steps=3, temperature=1.5),
    "random order": RandomOrderSampler(denoising_steps=5, temperature=0.7),
    "random order, one by one": RandomOrderSampler(),
    "of one's own": LeftToRight(),
    "random order in blocks": RandomOrderSampler(block_length=4, denoising_steps=6, temperature=0.7),
}
PROMPTS = ["12", "1234", "3", "44 12"]


@pytest.fixture(params=SAMPLERS.values(), ids=SAMPLERS.keys())
def sampler(request) -> Sampler:
    return request.param


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(with_reference=False)


def keys_of(index: list[int], seed: int = 0) -> torch.Tensor:
    return row_keys(seed, torch.tensor(index), group_size=1, buffer=0).squeeze(1)


def sample(
    policy, sampler, prompts=PROMPTS, index=None, *, seed: int = 0, padding: int = 0, length: int = LENGTH
) -> Samples:
    """One completion per prompt; ``index`` tells prompts apart in the keys."""
    batch = prompt_batch(policy, prompts, index)
    ids, mask = pad_more(batch.prompt_ids, batch.prompt_mask, padding)
    with evaluating(policy):
        return sampler.sample(
            policy, ids, mask, completion_length=length, keys=keys_of(batch.prompt_index.tolist(), seed)
        )


def assert_same(found: Samples, expected: Samples) -> None:
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert torch.equal(found.reveal_step, expected.reveal_step)
    torch.testing.assert_close(found.log_prob, expected.log_prob, atol=1e-5, rtol=1e-5)


def rows_of(samples: Samples, rows) -> Samples:
    return Samples(samples.completion_ids[rows], samples.reveal_step[rows], samples.log_prob[rows])


# Completions ----------------------------------------------------------------------------------------------------------


def test_no_mask_is_left_and_no_banned_id_is_drawn(policy, sampler):
    prompts = PROMPTS * 16
    samples = sample(policy, sampler, prompts, list(range(len(prompts))))
    assert samples.completion_ids.shape == (64, LENGTH)
    assert not torch.isin(samples.completion_ids, torch.tensor(NEVER_SAMPLED)).any()
    assert MASK in NEVER_SAMPLED


def test_prompts_are_never_touched(policy, sampler):
    batch = prompt_batch(policy, PROMPTS)
    ids, mask = batch.prompt_ids.clone(), batch.prompt_mask.clone()
    seen = []
    handle = policy.model.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0][:, : ids.shape[1]].clone())
    )
    with evaluating(policy):
        sampler.sample(
            policy, batch.prompt_ids, batch.prompt_mask, completion_length=LENGTH, keys=keys_of([0, 1, 2, 3])
        )
    handle.remove()
    assert torch.equal(batch.prompt_ids, ids)
    assert torch.equal(batch.prompt_mask, mask)
    assert len(seen) == sampler.num_steps(LENGTH)
    assert all(torch.equal(prompt_part, ids) for prompt_part in seen)


def test_every_position_is_revealed_in_a_step_of_its_own_or_shared(policy, sampler):
    steps = sampler.num_steps(LENGTH)
    revealed = sample(policy, sampler).reveal_step
    assert ((revealed >= 0) & (revealed < steps)).all()
    assert all(set(row) == set(range(steps)) for row in revealed.tolist())


def test_a_completion_does_not_depend_on_the_other_rows(policy, sampler):
    together = sample(policy, sampler)
    for row, prompt in enumerate(PROMPTS):
        assert_same(sample(policy, sampler, [prompt], [row]), rows_of(together, [row]))


def test_a_completion_does_not_depend_on_the_order_of_the_rows(policy, sampler):
    order = [2, 0, 3, 1]
    shuffled = sample(policy, sampler, [PROMPTS[row] for row in order], order)
    assert_same(shuffled, rows_of(sample(policy, sampler), order))


@pytest.mark.parametrize("padding", [1, 7])
def test_a_completion_does_not_depend_on_the_padding(policy, sampler, padding):
    assert_same(sample(policy, sampler, padding=padding), sample(policy, sampler))


def test_the_same_keys_give_the_same_completions_whatever_the_global_seed(policy, sampler):
    torch.manual_seed(1)
    first = sample(policy, sampler)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert_same(sample(policy, sampler), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_keys_give_other_completions_unless_greedy(policy, sampler):
    prompts = ["12"] * 8
    samples = sample(policy, sampler, prompts, list(range(8)))
    different = len({tuple(row) for row in samples.completion_ids.tolist()})
    assert different == 1 if sampler.temperature == 0 else different > 1
    other_seed = sample(policy, sampler, prompts, list(range(8)), seed=1)
    assert torch.equal(other_seed.completion_ids, samples.completion_ids) == (sampler.temperature == 0)


# Draws ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("sampler_class", [ConfidenceSampler, RandomOrderSampler])
def test_draws_follow_the_softmax_at_the_sampling_temperature(sampler_class, temperature):
    rows = 8000
    logits = 2 * torch.rand(32, generator=torch.Generator().manual_seed(0)) - 1
    fixed = tiny_policy(model=FixedLogits(logits), with_reference=False)
    prompt = torch.zeros(rows, 1, dtype=torch.long)
    with evaluating(fixed):
        samples = sampler_class(temperature=temperature).sample(
            fixed,
            prompt,
            torch.ones_like(prompt, dtype=torch.bool),
            completion_length=1,
            keys=keys_of(list(range(rows))),
        )
    allowed = [token for token in range(32) if token not in NEVER_SAMPLED]
    probabilities = (logits[allowed].double() / temperature).softmax(0)
    counts = samples.completion_ids.flatten().bincount(minlength=32)[allowed]
    assert counts.sum() == rows
    assert (probabilities * rows).min() > 5
    assert chisquare(counts.numpy(), (probabilities * rows).numpy()).pvalue > 1e-3
    expected = (logits[allowed] / temperature).log_softmax(0)[
        [allowed.index(t) for t in samples.completion_ids.flatten().tolist()]
    ]
    torch.testing.assert_close(samples.log_prob.flatten(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "sampler_of_pairs",
    [
        RandomOrderSampler(),
        RandomOrderSampler(denoising_steps=1),
        ConfidenceSampler(remasking="random", block_length=1),
    ],
    ids=["in two steps", "in one step", "in two blocks"],
)
def test_draws_at_two_positions_are_independent(sampler_of_pairs):
    rows, allowed, probabilities = 4000, [6, 14, 24], torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    logits = torch.full((32,), -1e9)
    logits[allowed] = probabilities.log().float()
    fixed = tiny_policy(model=FixedLogits(logits), with_reference=False)
    prompt = torch.zeros(rows, 1, dtype=torch.long)
    with evaluating(fixed):
        ids = sampler_of_pairs.sample(
            fixed,
            prompt,
            torch.ones_like(prompt, dtype=torch.bool),
            completion_length=2,
            keys=keys_of(list(range(rows))),
        ).completion_ids
    pairs = torch.searchsorted(torch.tensor(allowed), ids.contiguous())
    counts = (pairs[:, 0] * 3 + pairs[:, 1]).bincount(minlength=9)
    expected = rows * probabilities[:, None] * probabilities
    assert chisquare(counts.numpy(), expected.flatten().numpy()).pvalue > 1e-3


@pytest.mark.parametrize("sampler_class", [ConfidenceSampler, RandomOrderSampler])
def test_temperature_zero_takes_the_most_likely_allowed_token(policy, sampler_class):
    batch = prompt_batch(policy, PROMPTS)
    with evaluating(policy):
        samples = sampler_class(temperature=0.0).sample(
            policy, batch.prompt_ids, batch.prompt_mask, completion_length=1, keys=keys_of([0, 1, 2, 3])
        )
        ids = torch.cat((batch.prompt_ids, torch.full((4, 1), MASK)), dim=1)
        logits = policy.model(ids, full_attention_mask(batch.prompt_mask, 1)).logits[:, -1]
    logits[:, list(NEVER_SAMPLED)] = -torch.inf
    assert samples.completion_ids.flatten().tolist() == logits.argmax(-1).tolist()
    assert (samples.log_prob == 0).all()


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler_class", [ConfidenceSampler, RandomOrderSampler])
def test_a_negative_temperature_is_an_error(sampler_class):
    with pytest.raises(ValueError, match=r"`temperature` must be at least 0.*got -0.1"):
        sampler_class(temperature=-0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("sampler_class", "name"),
    [
        (ConfidenceSampler, "temperature"),
        (ConfidenceSampler, "threshold"),
        (ConfidenceSampler, "factor"),
        (RandomOrderSampler, "temperature"),
        (WinoSampler, "temperature"),
        (WinoSampler, "threshold"),
        (WinoSampler, "verification_threshold"),
    ],
)
def test_options_that_are_no_finite_number_are_errors(sampler_class, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value}"):
        sampler_class(**{name: value})


@pytest.mark.parametrize("sampler_class", [ConfidenceSampler, RandomOrderSampler, WinoSampler])
@pytest.mark.parametrize(("name", "value"), [("top_k", 0), ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan)])
def test_a_truncation_to_nothing_or_of_more_than_all_is_an_error(sampler_class, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value}"):
        sampler_class(**{name: value})


@pytest.mark.parametrize("truncation", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
@pytest.mark.parametrize("sampler_class", [ConfidenceSampler, RandomOrderSampler, WinoSampler])
def test_drawn_from_the_most_likely_token_alone_completions_are_greedy_ones(policy, sampler_class, truncation):
    prompt_ids, prompt_mask = torch.tensor([[7, 9, 12]]), torch.ones(1, 3, dtype=torch.bool)
    run = {"completion_length": 8, "keys": torch.tensor([3])}
    with torch.no_grad():
        greedy, truncated = (
            sampler_class(**options).sample(policy, prompt_ids, prompt_mask, **run)
            for options in ({"temperature": 0.0}, {"temperature": 1.0, **truncation})
        )
    assert torch.equal(greedy.completion_ids, truncated.completion_ids)
    assert torch.equal(greedy.reveal_step, truncated.reveal_step)
    torch.testing.assert_close(truncated.log_prob, torch.zeros(1, 8))


def test_trajectory_log_probs_refuse_a_truncated_distribution():
    with pytest.raises(ValueError, match="leave out `top_k` and `top_p`"):
        TrajectoryEstimator().validate(RandomOrderSampler(top_p=0.9))


@pytest.mark.parametrize("sampler_class", [ConfidenceSampler, RandomOrderSampler])
def test_fewer_than_one_step_is_an_error(sampler_class):
    with pytest.raises(ValueError, match=r"`denoising_steps` must be at least 1.*got 0"):
        sampler_class(denoising_steps=0)


@pytest.mark.parametrize("sampler_class", [ConfidenceSampler, RandomOrderSampler])
def test_more_steps_than_tokens_are_an_error(sampler_class):
    with pytest.raises(ValueError, match=r"at most `completion_length`, got 9 and 8; use null"):
        sampler_class(denoising_steps=9).validate(8)


def test_steps_default_to_one_token_each():
    assert RandomOrderSampler().num_steps(12) == 12
    assert RandomOrderSampler(denoising_steps=3).num_steps(12) == 3


@pytest.mark.parametrize(
    ("places", "steps", "counts"),
    [(8, 8, [1] * 8), (8, 1, [8]), (8, 3, [3, 3, 2]), (5, 2, [3, 2]), (7, 4, [2, 2, 2, 1])],
)
def test_places_are_spread_evenly_over_the_steps_the_larger_shares_first(places, steps, counts):
    assert reveal_counts(places, steps) == counts


def test_a_sampler_prints_its_options():
    printed = repr(ConfidenceSampler(block_length=4, temperature=0.2))
    assert printed.startswith("ConfidenceSampler(")
    assert "block_length=4" in printed
    assert "temperature=0.2" in printed
