"""The plain decoding is as plain as the published one, and no plainer."""

from collections import Counter

import pytest
import torch
from plain_policies import CACHES, plain, policy_of, prompts_of
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts operations by name; those whose result ends in the vocabulary by name, dtype and positions."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.names, self.wide = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.names[name] += 1
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (self.vocab_size,):
            self.wide[name, result.dtype, result.numel() // self.vocab_size] += 1
        return result


def operations_of(cache: str, temperature: float, rows: int = 3) -> tuple[Operations, list[int]]:
    """Of two blocks of four steps each, prompts of nine tokens; with the positions fed in at each forward."""
    policy, fed = policy_of(211), []
    head = policy.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: fed.append(output.shape[:2].numel()))
    with Operations(211) as operations:
        plain(
            policy,
            prompts_of(rows, 211, padded=False),
            denoising_steps=8,
            cache=cache,
            temperature=temperature,
            ban=None,
        )
    handle.remove()
    return operations, fed


FED = {"none": [25] * 8, "prefix": [25, 16, 16, 16, 25, 8, 8, 8], "dual": [25, 8, 8, 8, 25, 8, 8, 8]}
"""Columns in each step: everything, everything from the block on, or the block."""


@pytest.mark.parametrize("cache", CACHES)
def test_the_head_is_computed_at_every_position_that_is_fed_in(cache):
    assert operations_of(cache, 0.0)[1] == [3 * columns for columns in FED[cache]]


@pytest.mark.parametrize("cache", CACHES)
def test_each_step_softmaxes_every_position_in_float64_once(cache):
    operations, fed = operations_of(cache, 0.0)
    softmaxes = {key: number for key, number in operations.wide.items() if "softmax" in key[0]}
    assert softmaxes == {("_softmax", torch.float64, rows): number for rows, number in Counter(fed).items()}
    casts = {key: number for key, number in operations.wide.items() if key[:2] == ("_to_copy", torch.float64)}
    assert casts == {("_to_copy", torch.float64, rows): number for rows, number in Counter(fed).items()}
    assert not any(key[0] in ("exp", "rand", "log") for key in operations.wide)


@pytest.mark.parametrize("cache", CACHES)
def test_above_temperature_zero_float64_noise_is_drawn_for_every_logit_and_twice_with_a_prefix(cache):
    operations, fed = operations_of(cache, 0.2)
    again = Counter(fed[1:4] + fed[5:8]) if cache == "prefix" else Counter()  # published, with the first result unused
    for name, per_step, doubled in [
        ("exp", 1, 1),
        ("rand", 1, 1),
        ("log", 1, 1),
        ("_softmax", 1, 0),
        ("_to_copy", 2, 1),
    ]:
        found = {key: number for key, number in operations.wide.items() if key[:2] == (name, torch.float64)}
        expected = {rows: per_step * number + doubled * again[rows] for rows, number in Counter(fed).items()}
        assert found == {(name, torch.float64, rows): number for rows, number in expected.items()}


@pytest.mark.parametrize("cache", CACHES)
def test_top_k_runs_once_per_row_and_step_and_the_rotary_tables_are_built_once(cache):
    operations, _ = operations_of(cache, 0.0)
    assert operations.names["topk"] == 3 * 8
    assert operations.names["cos"] == operations.names["sin"] == 1


@pytest.mark.parametrize(("cache", "concatenated"), [("none", 0), ("prefix", 6), ("dual", 0)])
def test_keys_are_concatenated_with_the_prefix_and_all_are_rotated_in_every_layer(cache, concatenated):
    """Each rotation concatenates halves; two per layer and forward. The prefix adds keys and values of later steps."""
    operations, _ = operations_of(cache, 0.0)
    assert operations.names["cat"] == 2 * (2 * 8 + 2 * concatenated)


@pytest.mark.parametrize("cache", CACHES)
def test_norms_are_computed_operation_by_operation(cache):
    """Two in each of two layers, and the last one."""
    operations, _ = operations_of(cache, 0.0)
    assert operations.names["rsqrt"] == 5 * 8
    assert not any("rms_norm" in name for name in operations.names)


@pytest.mark.parametrize(("cache", "cached"), [("none", 0), ("prefix", 0), ("dual", 6)])
def test_the_dual_cache_searches_each_row_in_every_layer_and_overwrites_it(cache, cached):
    operations, uncached = operations_of(cache, 0.0)[0].names, operations_of("none", 0.0)[0].names
    assert operations["index_put_"] - uncached["index_put_"] == 2 * cached * 3 * 2  # keys and values
    assert operations["nonzero"] - uncached["nonzero"] == 2 * cached * (3 + 1)
