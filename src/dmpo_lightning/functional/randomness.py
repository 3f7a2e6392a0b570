"""Keyed randomness: every draw is a hash of what it is for, so a completion never depends on its batch, its rank or a
restart.
"""

import math
from enum import IntEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_RESOLUTION = 23
"""Bits of a uniform draw: with the half step added, every value is exact in float32 and lies strictly inside (0, 1)."""
_BUCKET, _SMALLEST_BUCKET = 512, 32
"""Tokens per bucket of `inverse_cdf`, at most and at least; the vocabularies of large models are multiples of both."""


class Purpose(IntEnum):
    """What a draw is for; two purposes never share a random number."""

    TOKEN = 1
    ORDER = 2
    REMASKING = 3
    ELBO = 4
    LOSS = 5


def row_keys(
    seed: int, prompt_index: Int[Tensor, " batch"], *, group_size: int, iteration: int
) -> Int[Tensor, "batch group"]:
    """One key per rollout, from (seed, prompt id, rollout index, iteration); ``iteration`` counts rollout buffers."""
    base = fold_in(fold_in(torch.full_like(prompt_index, _wrap(seed), dtype=torch.int64), iteration), prompt_index)
    return fold_in(base[:, None], torch.arange(group_size, device=prompt_index.device))


def fold_in(keys: Int[Tensor, "*rows"], value: int | Int[Tensor, "*others"]) -> Int[Tensor, "*results"]:
    """New keys, statistically independent for every ``value``; broadcasts."""
    step = _wrap(_GOLDEN_GAMMA * (1 + value)) if isinstance(value, int) else _GOLDEN_GAMMA * (1 + value.long())
    return _mix(_mix(keys.long()) + step)


def uniforms(keys: Int[Tensor, "*rows"], count: int) -> Float[Tensor, "*rows {count}"]:
    """``count`` float32 draws in the open interval (0, 1) for each key, the same on every device."""
    bits = _mix(fold_in(keys[..., None], torch.arange(count, device=keys.device)))
    return (_shift_right(bits, 64 - _RESOLUTION).float() + 0.5) * 2.0**-_RESOLUTION


def inverse_cdf(probabilities: Float[Tensor, "*rows vocab"], uniform: Float[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
    """Exact categorical draw: the first token whose cumulative probability reaches ``uniform`` of the total; zero
    probabilities are never drawn.

    A large vocabulary is cut into buckets: first the bucket is found, then the token in it, so that most of the
    vocabulary is only summed.
    """
    size = math.gcd(probabilities.shape[-1], _BUCKET)
    if size < _SMALLEST_BUCKET or probabilities.shape[-1] <= _BUCKET:
        return _first_reaching(cumulative := probabilities.cumsum(-1), uniform * cumulative[..., -1])
    buckets = probabilities.unflatten(-1, (-1, size))
    edges = buckets.sum(-1).cumsum(-1)
    target = uniform * edges[..., -1]
    bucket = _first_reaching(edges, target)
    before = torch.nn.functional.pad(edges, (1, 0)).gather(-1, bucket[..., None]).squeeze(-1)
    inside = buckets.gather(-2, bucket[..., None, None].expand(*bucket.shape, 1, size)).squeeze(-2).cumsum(-1)
    rest = (target - before).clamp(min=torch.finfo(inside.dtype).tiny).minimum(inside[..., -1])
    return bucket * size + _first_reaching(inside, rest)


def _first_reaching(cumulative: Float[Tensor, "*rows values"], target: Float[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
    return torch.searchsorted(cumulative, target[..., None]).squeeze(-1).clamp(max=cumulative.shape[-1] - 1)


def _mix(z: Int[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) in wrapping int64 arithmetic."""
    z = (z ^ _shift_right(z, 30)) * _MULTIPLIERS[0]
    z = (z ^ _shift_right(z, 27)) * _MULTIPLIERS[1]
    return z ^ _shift_right(z, 31)


def _wrap(value: int) -> int:
    """A Python integer as int64 arithmetic would have it."""
    return (value + 2**63) % 2**64 - 2**63


def _shift_right(z: Int[Tensor, "*rows"], bits: int) -> Int[Tensor, "*rows"]:
    return (z >> bits) & (2 ** (64 - bits) - 1)
