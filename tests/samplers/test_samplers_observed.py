"""Whoever watches a canvas sees every change of it, and changes nothing."""

import pytest
import torch
from test_samplers_base import LENGTH, PROMPTS, SAMPLERS, assert_same, sample

from dmpo_lightning.samplers import ConfidenceSampler, WinoSampler, observed
from helpers import MASK, FixedLogits, tiny_policy

WATCHED = SAMPLERS | {
    "parallel": ConfidenceSampler(block_length=4, threshold=0.3),
    "cache": ConfidenceSampler(block_length=4, cache="dual"),
    "wino": WinoSampler(block_length=4, threshold=0.1, verification_threshold=0.9),
}


class Recorder:
    """Draws the completions from the changes alone."""

    def __init__(self, rows, length=LENGTH):
        self.ids = torch.full((rows, length), MASK)
        self.confidence = torch.full((rows, length), torch.nan)
        self.rows, self.steps = [], []

    def __call__(self, change):
        rows = change.rows
        self.rows.append(rows.tolist())
        self.ids[rows] = torch.where(change.written, change.completion_ids, self.ids[rows])
        self.confidence[rows] = torch.where(change.written, change.confidence, self.confidence[rows])
        assert torch.equal(self.ids[rows], change.completion_ids)
        assert bool(change.confidence[~change.written].isnan().all())


@pytest.mark.parametrize("sampler", WATCHED.values(), ids=WATCHED.keys())
def test_the_changes_are_all_there_is_to_a_completion(sampler):
    policy, recorder = tiny_policy(with_reference=False), Recorder(len(PROMPTS))
    expected = sample(policy, sampler)
    with observed(recorder):
        found = sample(policy, sampler)
    assert_same(found, expected)
    assert torch.equal(recorder.ids, found.completion_ids)
    assert bool(((recorder.confidence > 0) & (recorder.confidence <= 1)).all())


def test_confidence_is_the_probability_at_temperature_1():
    logits = torch.full((32,), -torch.inf)
    logits[6], logits[7] = 0.75, 0.25
    policy, recorder = tiny_policy(model=FixedLogits(logits.log().nan_to_num(nan=-50.0))), Recorder(1)
    with observed(recorder):
        found = sample(policy, ConfidenceSampler(temperature=0.0), PROMPTS[:1])
    assert found.log_prob.tolist() == [[0.0] * LENGTH]  # of a greedy draw
    torch.testing.assert_close(recorder.confidence, torch.full((1, LENGTH), 0.75))


def test_rows_keep_their_numbers_where_others_end_early_and_over_several_calls():
    policy = tiny_policy(with_reference=False)
    sampler = ConfidenceSampler(block_length=2, denoising_steps=4, early_exit=True)
    ends = ((seed, (sample(policy, sampler, seed=seed).reveal_step < 0).any(1)) for seed in range(100))
    some_end = next(seed for seed, over in ends if over.any() and not over.all())
    recorder = Recorder(2 * len(PROMPTS))
    with observed(recorder):
        first = sample(policy, sampler, seed=some_end)
        second = sample(policy, sampler)
    assert any(0 < len(rows) < len(PROMPTS) for rows in recorder.rows)
    assert torch.equal(recorder.ids, torch.cat((first.completion_ids, second.completion_ids)))
    filled = torch.cat((first.reveal_step, second.reveal_step)) < 0
    assert torch.equal(recorder.confidence.isnan(), filled)


def test_nobody_watches_behind_the_context():
    recorder = Recorder(len(PROMPTS))
    with observed(recorder):
        pass
    sample(tiny_policy(with_reference=False), ConfidenceSampler())
    assert recorder.rows == []
