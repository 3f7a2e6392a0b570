"""Keyed randomness: every random number is a hash of what it is for.

No generator advances from draw to draw. A completion therefore never depends on what else is in its batch, on its rank
or on a restart, and a restart needs counters instead of generator states.

Keys are int64 tensors. Torch has no arithmetic on unsigned 64-bit integers, but int64 addition and multiplication wrap
around and yield the same 64 bits, so SplitMix64 can be computed with them, equally on every device. Only its right
shifts need care (see `_shift_right`), and constants above 2**63 are written as the negative numbers of the same bits.
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
"""Tokens per bucket of `inverse_cdf`, at most and at least. Vocabularies of large models divide into such buckets."""


class Purpose(IntEnum):
    """What a random number is drawn for. Folded into a key, it keeps two purposes from sharing random numbers."""

    TOKEN = 1
    ORDER = 2
    REMASKING = 3
    ELBO = 4
    LOSS = 5
    PROMPT = 6


def row_keys(
    seed: int, prompt_index: Int[Tensor, " batch"], *, group_size: int, buffer: int
) -> Int[Tensor, "batch group"]:
    """One key per rollout, a hash of (seed, buffer, prompt index, rollout index).

    ``prompt_index`` holds positions in a data set, and ``buffer`` is the number of rollout buffers before this one.
    """
    base = fold_in(fold_in(torch.full_like(prompt_index, _wrap(seed), dtype=torch.int64), buffer), prompt_index)
    return fold_in(base[:, None], torch.arange(group_size, device=prompt_index.device))


def check_seed(seed: int) -> int:
    """The same seed. Raises ValueError for one that torch does not take, or that is another one in 64 bits."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"`seed` must be from -2**63 to 2**64 - 1, got {seed}.")
    return seed


def fold_in(keys: Int[Tensor, "*rows"], value: int | Int[Tensor, "*others"]) -> Int[Tensor, "*results"]:
    """New keys from keys and a value, statistically independent for different values. Both are broadcast."""
    # Number `value` of the SplitMix64 stream that starts at the mixed key: its state + (1 + value) gamma, mixed again.
    step = _wrap(_GOLDEN_GAMMA * (1 + value)) if isinstance(value, int) else _GOLDEN_GAMMA * (1 + value.long())
    return _mix(_mix(keys.long()) + step)


def uniforms(keys: Int[Tensor, "*rows"], count: int) -> Float[Tensor, "*rows {count}"]:
    """``count`` float32 draws from the open interval (0, 1) for each key, the same on every device."""
    bits = _mix(fold_in(keys[..., None], torch.arange(count, device=keys.device)))
    return (_shift_right(bits, 64 - _RESOLUTION).float() + 0.5) * 2.0**-_RESOLUTION


def inverse_cdf(probabilities: Float[Tensor, "*rows vocab"], uniform: Float[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
    """Draws a token exactly: the first one whose cumulative probability reaches ``uniform`` of the total.

    ``probabilities`` need not sum to 1. A token of probability zero is never drawn.
    """
    # A cumulative sum over a whole vocabulary is what costs. So a large one is cut into buckets of equal size, which
    # are merely summed. A first search finds the bucket, and a second one, in that bucket alone, finds the token.
    size = math.gcd(probabilities.shape[-1], _BUCKET)
    if size < _SMALLEST_BUCKET or probabilities.shape[-1] <= _BUCKET:
        return _first_reaching(cumulative := probabilities.cumsum(-1), uniform * cumulative[..., -1])
    buckets = probabilities.unflatten(-1, (-1, size))
    edges = buckets.sum(-1).cumsum(-1)
    target = uniform * edges[..., -1]
    bucket = _first_reaching(edges, target)
    before = torch.nn.functional.pad(edges, (1, 0)).gather(-1, bucket[..., None]).squeeze(-1)
    inside = buckets.gather(-2, bucket[..., None, None].expand(*bucket.shape, 1, size)).squeeze(-2).cumsum(-1)
    # What is left of the target inside the bucket. Rounding may leave nothing, for which the search would return the
    # bucket's first token even at probability zero, or more than the bucket holds, for which it would run past the end.
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
    """The int64 of the same lowest 64 bits as a Python integer of any size."""
    return (value + 2**63) % 2**64 - 2**63


def _shift_right(z: Int[Tensor, "*rows"], bits: int) -> Int[Tensor, "*rows"]:
    # Torch shifts copies of the sign bit in from the left; SplitMix64 is defined with zeros there.
    return (z >> bits) & (2 ** (64 - bits) - 1)
