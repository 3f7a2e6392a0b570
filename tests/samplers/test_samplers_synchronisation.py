"""How often a sampler waits for the device: never within a static block, once per step of a dynamic one.

`tests/gpu/test_gpu_synchronisation.py` asks a GPU itself.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dmpo_lightning.functional import row_keys
from dmpo_lightning.policy import evaluating
from dmpo_lightning.samplers import ConfidenceSampler
from helpers import tiny_policy

WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2"}


class Waits(TorchDispatchMode):
    """Counts operations whose result the host needs: numbers, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        indices = args[1] if name in ("aten::index", "aten::index_put_") else ()
        by_truth = any(index is not None and index.dtype == torch.bool for index in indices)
        self.count += name in WAITING or by_truth
        return func(*args, **(kwargs or {}))


def sampled(sampler: ConfidenceSampler, length: int = 16, device: str = "cpu") -> tuple[int, int]:
    """Waits, and forwards, of a call for three different prompts."""
    policy, forwards = tiny_policy().to(device), []
    ids = torch.arange(6, 18, device=device).view(3, 4)
    keys = row_keys(0, torch.arange(3, device=device), group_size=1, buffer=0).squeeze(1)
    hook = policy.model.register_forward_hook(lambda *_: forwards.append(1))
    with evaluating(policy), Waits() as waits:
        sampler.sample(policy, ids, torch.ones_like(ids, dtype=torch.bool), completion_length=length, keys=keys)
    hook.remove()
    return waits.count, len(forwards)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_a_static_schedule_waits_once_before_it_starts_however_many_steps_it_takes(cache, temperature, remasking):
    options = {"block_length": 8, "cache": cache, "temperature": temperature, "remasking": remasking}
    few, many = (sampled(ConfidenceSampler(denoising_steps=steps, **options)) for steps in (2, 16))
    assert (few[1], many[1]) == (2, 16)
    assert few[0] == many[0] <= 1


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("rule", [{"threshold": 0.5}, {"factor": 1.0}])
def test_a_dynamic_schedule_waits_at_most_once_per_step(cache, rule):
    sampler = ConfidenceSampler(block_length=8, cache=cache, **rule)
    waits, forwards = sampled(sampler)
    assert 2 < forwards <= 16
    assert waits <= forwards + 3  # before it starts, and where each of two blocks ends
