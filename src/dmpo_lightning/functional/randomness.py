"""Keyed randomness: every draw is a hash of what it is for, so a completion never depends on its batch, its rank or a
restart.
"""

from enum import IntEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_RESOLUTION = 23
"""Bits of a uniform draw: with the half step added, every value is exact in float32 and lies strictly inside (0, 1)."""


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
    """Exact categorical draw: the first token whose cumulative probability reaches ``uniform``; zero probabilities
    are never drawn.
    """
    cumulative = probabilities.cumsum(-1)
    return torch.searchsorted(cumulative, (uniform[..., None] * cumulative[..., -1:])).squeeze(-1)


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
