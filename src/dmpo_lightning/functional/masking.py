"""Random maskings of a completion with exact counts."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional.randomness import fold_in, uniforms


def draw_masks(
    keys: Int[Tensor, "*rows"], *, length: int, replicates: int, antithetic: bool = True
) -> Bool[Tensor, "*rows {replicates} {length}"]:
    """Masks (True = masked) with a count uniform on 1..length and uniform positions, one set per key.

    ``antithetic`` draws them in pairs (see `antithetic_pair`) and needs an even number of ``replicates`` (ValueError).
    """
    if antithetic and replicates % 2:
        raise ValueError(
            f"`replicates` must be even when `antithetic` is true, got {replicates}; use {replicates + 1} or "
            f"antithetic: false."
        )
    draws = replicates // 2 if antithetic else replicates
    noise = uniforms(keys, draws * (length + 1)).unflatten(-1, (draws, length + 1))
    rank, count = position_ranks(noise[..., :length]), mask_count(noise[..., length], length)
    if antithetic:
        return torch.stack(antithetic_pair(rank, count), dim=-2).flatten(-3, -2)
    return rank < count[..., None]


def draw_block_masks(
    keys: Int[Tensor, "*rows"], *, length: int, block_length: int, replicates: int, antithetic: bool = True
) -> tuple[Bool[Tensor, "*rows {replicates} {length}"], Bool[Tensor, "*rows {replicates} {length}"]]:
    """What block-wise decoding meets: a random block masked in part, all blocks before it known, all behind it masked.

    Returns the masks, and which of the masked positions lie in the block, which are those it decodes. The block is
    uniform, its masking as in `draw_masks`; antithetic pairs share their block. Raises ValueError where the blocks do
    not fill ``length``.
    """
    if block_length < 1 or length % block_length:
        raise ValueError(f"`block_length` must divide the length {length}, got {block_length}.")
    draws = replicates // 2 if antithetic else replicates
    blocks = mask_count(uniforms(fold_in(keys, 1), draws), length // block_length) - 1
    inside = draw_masks(keys, length=block_length, replicates=replicates, antithetic=antithetic)
    blocks = blocks.repeat_interleave(replicates // draws, -1)[..., None]
    of_position = torch.arange(length, device=keys.device) // block_length
    decoded = (of_position == blocks) & inside.repeat(*[1] * (inside.dim() - 1), length // block_length)
    return decoded | (of_position > blocks), decoded


def position_ranks(noise: Float[Tensor, "*rows length"]) -> Int[Tensor, "*rows length"]:
    """The place of each position in the random permutation that sorts ``noise``: 0 comes first."""
    return noise.argsort(dim=-1, stable=True).argsort(dim=-1)


def mask_count(uniform: Float[Tensor, "*rows"], length: int) -> Int[Tensor, "*rows"]:
    """A count uniform on 1..length from a uniform draw in (0, 1)."""
    return (uniform * length).long().clamp(max=length - 1) + 1


def antithetic_pair(
    rank: Int[Tensor, "*rows length"], count: Int[Tensor, "*rows"]
) -> tuple[Bool[Tensor, "*rows length"], Bool[Tensor, "*rows length"]]:
    """The masks {s_1..s_m} and {s_m..s_L} of a permutation s: both counts are uniform on 1..L, neither mask is empty.

    They share one position; plain complements would leave one mask empty or bias the ELBO.
    """
    return rank < count[..., None], rank >= count[..., None] - 1


def trajectory_masks(
    reveal_step: Int[Tensor, "*rows length"], steps: int | range
) -> tuple[Bool[Tensor, "*rows steps length"], Bool[Tensor, "*rows steps length"]]:
    """What was masked before each denoising step of a recorded order, and what that step revealed; of the first
    ``steps`` steps, or of those in a range.
    """
    chosen = range(steps) if isinstance(steps, int) else steps
    step = torch.arange(chosen.start, chosen.stop, device=reveal_step.device)[:, None]
    return reveal_step[..., None, :] >= step, reveal_step[..., None, :] == step
