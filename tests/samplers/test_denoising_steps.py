"""Who watches a policy learns of each denoising step, over all chunks of rows."""

import pytest

from dmpo_lightning import ConfidenceSampler, RandomOrderSampler, WinoSampler
from dmpo_lightning.rollout import Sampling, sample_completions
from helpers import prompt_batch, tiny_policy

SAMPLERS = [
    RandomOrderSampler(denoising_steps=4),
    ConfidenceSampler(denoising_steps=4, block_length=4),
    ConfidenceSampler(threshold=0.9, block_length=4),
    WinoSampler(block_length=4),
]


def sample(policy, sampler, rows_per_forward=None):
    sampling = Sampling(sampler, 8, 2, rows_per_forward=rows_per_forward)
    return sample_completions(policy, prompt_batch(policy, ["12", "3"]), sampling)[0]


@pytest.mark.parametrize("sampler", SAMPLERS[:2], ids=str)
def test_each_step_is_told_once_over_all_chunks(sampler):
    policy, told = tiny_policy(), []
    policy.on_denoising_step = lambda done, total: told.append((done, total))
    sample(policy, sampler, rows_per_forward=2)
    assert told == [(n, 8) for n in (0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_steps_never_go_back_and_end_at_their_number_whoever_watches(sampler):
    policy, told = tiny_policy(), []
    unwatched = sample(policy, sampler)
    policy.on_denoising_step = lambda done, total: told.append((done, total))
    watched = sample(policy, sampler)
    assert watched.completion_ids.equal(unwatched.completion_ids)
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {sampler.num_steps(8)}
    assert done[-1] == totals[-1]
