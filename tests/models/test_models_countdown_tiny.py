"""The embedded base of Countdown: it knows how to answer and seldom what, so that there is something to learn."""

from pathlib import Path

import pytest
import torch

from dmpo_lightning import ConfidenceSampler, CountdownDataModule, CountdownDemonstrations, load_model, load_tokenizer
from dmpo_lightning.models.loading import fetch
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import Sampling, grouped, sample_completions


@pytest.fixture(scope="module")
def answers():
    """Scores of the base on held-out puzzles, as ``[puzzles, group]`` by temperature."""
    policy = Policy(load_model("countdown_tiny"), load_tokenizer("countdown_tiny"), with_reference=False)
    data = CountdownDataModule(
        source="generated",
        largest=9,
        largest_target=99,
        brackets=False,
        prompt_template="{numbers}={target}",
        sizes={"train": 1, "validation": 256, "test": 512},
        tokenizer="countdown_tiny",
        evaluation_batch_size=128,
    )
    prompts, task = next(iter(data.test_dataloader())), CountdownDemonstrations()
    found = {}
    for temperature, group in ((1.0, 8), (0.5, 1), (0.2, 1), (0.0, 1)):
        sampler = ConfidenceSampler(temperature=temperature)
        samples, _ = sample_completions(policy, prompts, Sampling(sampler, 8, group))
        texts = grouped(policy.decode(samples.completion_ids), group)
        scores = [[task.score(e, text) for text in row] for e, row in zip(prompts.examples, texts, strict=True)]
        found[temperature] = {
            name: torch.tensor([[score[name] for score in row] for row in scores]) for name in ("valid", "right")
        }
    return found


def test_the_base_writes_expressions_of_the_given_numbers(answers):
    assert all(found["valid"].mean() >= 0.8 for found in answers.values())


def test_no_temperature_solves_more_than_a_quarter(answers):
    assert 0.1 <= answers[1.0]["right"].mean()
    assert all(found["right"].mean() <= 0.25 for found in answers.values())


def test_groups_of_four_and_of_eight_have_something_to_learn_from(answers):
    right = answers[1.0]["right"]
    for groups, least in ((right, 0.2), (right.reshape(-1, 4), 0.1)):
        rate = groups.mean(-1)
        assert ((rate > 0) & (rate < 1)).float().mean() >= least


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in Path(fetch("countdown_tiny")).iterdir()) < 1_000_000
