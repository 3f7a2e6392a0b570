"""How often a sampler waits for the GPU, by torch's own count: never within a static block.

`tests/samplers/test_samplers_synchronisation.py` counts operations that would wait; copies to the device it cannot see.
"""

import warnings
from collections.abc import Callable

import pytest
import torch

from dmpo_lightning.functional import row_keys
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.samplers import ConfidenceSampler, RandomOrderSampler, Sampler, WinoSampler
from dmpo_lightning.samplers.canvas import Canvas
from dmpo_lightning.samplers.confidence import Block
from helpers import tiny_policy

pytestmark = pytest.mark.gpu
LENGTH = 16
WAITED = "called a synchronizing CUDA operation"
NEEDS_CUDA = "ran; only CUDA says when the host waits"
CACHES = ("none", "prefix", "dual")


def prompts(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three different prompts, their mask and the keys."""
    ids = torch.arange(6, 18, device=device).view(3, 4)
    keys = row_keys(0, torch.arange(3, device=device), group_size=1, buffer=0).squeeze(1)
    return ids, torch.ones_like(ids, dtype=torch.bool), keys


def without_waiting(device: torch.device, action: Callable[[], None]) -> None:
    """Fails where the host waits for the device, with the line that does."""
    if device.type != "cuda":
        action()
        pytest.skip(NEEDS_CUDA)
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        action()
    finally:
        torch.cuda.set_sync_debug_mode("default")


OPTIONS = [
    *({"cache": cache} | more for cache in CACHES for more in ({}, {"remasking": "random"})),
]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(map(str, options.values())))
def test_a_static_block_never_waits(device, options, temperature):
    sampler = ConfidenceSampler(block_length=8, denoising_steps=16, temperature=temperature, **options)
    policy, (ids, mask, keys) = tiny_policy(with_reference=False).to(device), prompts(device)
    canvas = Canvas.blank(policy, ids, mask, LENGTH, keys)
    with evaluating(policy):
        Block(sampler, canvas, 0, 8).decode()  # asks once which prompts are equal, and warms up
        without_waiting(device, Block(sampler, canvas, 8, 8).decode)


def waits(device: torch.device, policy: Policy, sampler: Sampler) -> tuple[list[str], int]:
    """Where the host waited in one call, and the number of forwards."""
    ids, mask, keys = prompts(device)
    forwards: list[int] = []
    hook = policy.model.register_forward_hook(lambda *_: forwards.append(1))
    with evaluating(policy), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            sampler.sample(policy, ids, mask, completion_length=LENGTH, keys=keys)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    hook.remove()
    places = [f"{each.filename.rpartition('/')[2]}:{each.lineno}" for each in said if WAITED in str(each.message)]
    return places, len(forwards)


PARALLEL = {
    **{
        f"threshold, {cache}": ConfidenceSampler(block_length=8, threshold=0.5, cache=cache)
        for cache in ("none", "dual")
    },
    "factor": ConfidenceSampler(block_length=8, factor=1.0),
    "wino": WinoSampler(block_length=8, threshold=0.3),
}


def confidence(steps: int, cache: str) -> ConfidenceSampler:
    return ConfidenceSampler(block_length=8, denoising_steps=steps, cache=cache)


STATIC = {
    **{cache: lambda steps, own=cache: confidence(steps, own) for cache in CACHES},
    "random order": lambda steps: RandomOrderSampler(denoising_steps=steps),
}


@pytest.mark.parametrize("name", STATIC)
def test_a_static_schedule_waits_equally_often_however_many_steps_it_takes(device, name):
    policy = tiny_policy(with_reference=False).to(device)
    few, many = (STATIC[name](steps) for steps in (2, 16))
    for sampler in (few, many):
        waits(device, policy, sampler)  # warms up
    (first, two), (second, sixteen) = (waits(device, policy, sampler) for sampler in (few, many))
    assert (two, sixteen) == (2, 16)
    if device.type != "cuda":
        pytest.skip(NEEDS_CUDA)
    assert first or name == "random order", "torch reported no wait, although prompts are compared once: is this blind?"
    assert len(first) == len(second) <= 2, f"waits of 2 forwards at {first}, of 16 at {second}"


@pytest.mark.parametrize("name", PARALLEL)
def test_a_parallel_schedule_waits_once_per_step(device, name):
    policy = tiny_policy(with_reference=False).to(device)
    waits(device, policy, PARALLEL[name])  # warms up
    places, forwards = waits(device, policy, PARALLEL[name])
    assert 2 < forwards <= 16
    if device.type != "cuda":
        pytest.skip(NEEDS_CUDA)
    assert len(places) <= forwards + 3, f"{len(places)} waits in {forwards} forwards, at {places}"
