"""Samplers give the CPU's completions, in every mode.

Where these tests run on the CPU, the comparison is with a policy whose logits are disturbed a hundred times more than
devices differ. That the completions stay the same shows that none of them hangs on a near tie.
"""

import pytest
import torch

from dmpo_lightning.functional import row_keys
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.samplers import ConfidenceSampler, RandomOrderSampler, Sampler, Samples, WinoSampler
from gpu.runs import assert_same
from helpers import prompt_batch, tiny_model, tiny_policy
from small_models import tiny_dream

pytestmark = pytest.mark.gpu
LENGTH, NOISE, SEED = 16, 1e-4, 6
PADDED, UNPADDED = ["12", "1234", "1234", "3", "44 12", "9"], ["1234", "1234", "5678", "0912"]
MODELS = {"LLaDA": tiny_model, "Dream": tiny_dream}


def confidence(**options) -> ConfidenceSampler:
    return ConfidenceSampler(**{"temperature": 0.0, "block_length": 8} | options)


CACHES = ("none", "prefix", "dual")
RULES = {"static": {"denoising_steps": 8}, "threshold": {"threshold": 0.5}, "factor": {"factor": 1.0}}
SAMPLERS: dict[str, Sampler] = {
    f"{rule}, cache {cache}": confidence(cache=cache, **options) for rule, options in RULES.items() for cache in CACHES
}
SAMPLERS |= {
    "one by one": confidence(block_length=None),
    "random remasking": confidence(remasking="random", denoising_steps=4),
    "early exit": confidence(block_length=4, early_exit=True),
    "early exit, threshold, cache dual": confidence(block_length=4, early_exit=True, threshold=0.5, cache="dual"),
    "random order": RandomOrderSampler(temperature=0.0),
    "random order in 5 steps": RandomOrderSampler(temperature=0.0, denoising_steps=5),
    "drawn, static": confidence(temperature=1.0, denoising_steps=8),
    "drawn, cache dual, threshold": confidence(temperature=0.5, cache="dual", threshold=0.5),
    "drawn, random order": RandomOrderSampler(temperature=0.7),
}
WINO = {"wino": WinoSampler(threshold=0.3), "wino in blocks": WinoSampler(block_length=8, threshold=0.2)}
CASES = [(name, "LLaDA", PADDED) for name in SAMPLERS | WINO]
# What differs by model is the forward with a cache and what a row attends to, for which these are enough.
CASES += [
    (name, model, prompts)
    for name in ("static, cache none", "threshold, cache dual", "drawn, random order")
    for model, prompts in (("LLaDA", UNPADDED), ("Dream", PADDED), ("Dream", UNPADDED))
]


def policy_of(model: str, seed: int) -> Policy:
    return tiny_policy(model=MODELS[model](seed), with_reference=False)


def disturbed(policy: Policy) -> Policy:
    """Adds noise to all logits that are computed."""
    exact, generator = policy.logits, torch.Generator().manual_seed(0)

    def logits(*arguments, **options):
        found = exact(*arguments, **options)
        return found + NOISE * (2 * torch.rand(found.shape, generator=generator) - 1)

    policy.logits = logits
    return policy


def sample(policy: Policy, sampler: Sampler, prompts: list[str], device: torch.device) -> Samples:
    batch = prompt_batch(policy, prompts).to(device)
    keys = row_keys(0, batch.prompt_index, group_size=1, buffer=0).squeeze(1)
    with evaluating(policy):
        return sampler.sample(policy, batch.prompt_ids, batch.prompt_mask, completion_length=LENGTH, keys=keys)


@pytest.mark.parametrize(
    ("name", "model", "prompts"),
    CASES,
    ids=[f"{name}, {model}, {'padded' if prompts is PADDED else 'unpadded'}" for name, model, prompts in CASES],
)
def test_completions_are_those_of_the_cpu(device, name, model, prompts):
    sampler = (SAMPLERS | WINO)[name]
    policy = policy_of(model, seed=SEED)
    expected = sample(policy, sampler, prompts, torch.device("cpu"))
    other = policy_of(model, seed=SEED).to(device) if device.type == "cuda" else disturbed(policy)
    found = sample(other, sampler, prompts, device)
    assert_same(found.reveal_step, expected.reveal_step, "steps that revealed each place")
    assert_same(found.completion_ids, expected.completion_ids, "tokens")
    assert_same(found.log_prob, expected.log_prob, "log-probs", within=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_some_completions_end_early(device, model):
    """Else the tests of the early exit prove nothing."""
    found = sample(policy_of(model, SEED).to(device), SAMPLERS["early exit"], PADDED, device)
    ended = (found.reveal_step < 0).any(1)
    assert 0 < int(ended.sum()) < len(ended), f"{int(ended.sum())} of {len(ended)} completions end early"


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_the_cpu(device, model):
    """How far devices differ at all; the disturbance above must be well beyond it."""
    policy = policy_of(model, SEED)
    batch = prompt_batch(policy, PADDED)
    ids = torch.cat((batch.prompt_ids, torch.full((len(PADDED), LENGTH), policy.facts.mask_token_id)), dim=1)
    mask = torch.nn.functional.pad(batch.prompt_mask, (0, LENGTH), value=True)
    width = batch.prompt_ids.shape[1]
    positions = torch.arange(len(ids))[:, None] * ids.shape[1] + torch.arange(width, ids.shape[1])
    with evaluating(policy):
        expected = policy.logits(ids, mask, positions)
        policy.to(device)
        found = policy.logits(ids.to(device), mask.to(device), positions.to(device))
    assert_same(found, expected, "logits", within=NOISE / 4)
