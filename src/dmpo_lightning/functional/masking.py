"""Random maskings of a completion, with a number of masked positions that is drawn exactly."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional.randomness import uniforms

QUADRATURE = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))
"""Nodes and weights of the three-point Gauss-Legendre rule on (0, 1)."""


def check_replicates(replicates: int, *, antithetic: bool, name: str = "replicates") -> None:
    """Raises ValueError unless there is at least one masking, and an even number of them where they come in pairs.

    ``name`` is what the argument is called in the message.
    """
    if replicates < 1 or (antithetic and replicates % 2):
        remedy = f"{replicates + 1} or antithetic: false" if replicates > 0 else "2"
        raise ValueError(
            f"`{name}` must be positive, and even when `antithetic` is true, got {replicates}; use {remedy}."
        )


def draw_masks(
    keys: Int[Tensor, "*rows"],
    *,
    length: int,
    replicates: int,
    antithetic: bool = True,
    blocks: Int[Tensor, "*rows {length}"] | None = None,
) -> Bool[Tensor, "*rows {replicates} {length}"]:
    """``replicates`` masks of each key, True = masked: a count uniform on 1..length at uniformly random positions.

    ``antithetic`` draws them in pairs whose errors partly cancel (see `antithetic_pair`). With ``blocks``, the block of
    each position, every block has a count of its own, uniform on 1..its number of positions. Positions of a negative
    block are never masked.

    Raises:
        ValueError: the number of replicates, see `check_replicates`.
    """
    check_replicates(replicates, antithetic=antithetic)
    draws = replicates // 2 if antithetic else replicates
    if blocks is not None:
        return _draw_in_blocks(keys, blocks, draws, antithetic=antithetic)
    # Each draw takes one uniform per position, which orders the positions, and one more for the count.
    noise = uniforms(keys, draws * (length + 1)).unflatten(-1, (draws, length + 1))
    rank, count = position_ranks(noise[..., :length]), mask_count(noise[..., length], length)
    if antithetic:
        return torch.stack(antithetic_pair(rank, count), dim=-2).flatten(-3, -2)
    return rank < count[..., None]


def _draw_in_blocks(
    keys: Int[Tensor, "*rows"], blocks: Int[Tensor, "*rows length"], draws: int, *, antithetic: bool
) -> Bool[Tensor, "*rows replicates length"]:
    length = blocks.shape[-1]
    # Each draw takes one uniform per position, which orders the positions of a block, and one per block for its count.
    noise = uniforms(keys, draws * 2 * length).unflatten(-1, (draws, 2 * length))
    blocks = blocks[..., None, :].expand(*noise.shape[:-1], length)
    sizes = block_sums(torch.ones_like(blocks), blocks)
    rank = position_ranks(blocks + noise[..., :length].double())
    # Blocks are sorted one behind the other, and a rank in its block counts from the block's first.
    first = rank.new_full((*rank.shape[:-1], length + 1), length).scatter_reduce(-1, blocks + 1, rank, "amin")
    rank = rank - first.gather(-1, blocks + 1)
    uniform = noise[..., length:].gather(-1, blocks.clamp(min=0))
    count = (uniform * sizes).long().minimum(sizes - 1) + 1
    counted = blocks >= 0
    if antithetic:
        pair = (rank < count) & counted, (rank >= count - 1) & counted
        return torch.stack(pair, dim=-2).flatten(-3, -2)
    return (rank < count) & counted


def block_sums(values: Int[Tensor, "*rows length"], blocks: Int[Tensor, "*rows length"]) -> Int[Tensor, "*rows length"]:
    """The sum of ``values`` over the block of each position. Blocks are numbered from -1 to length - 1 in any order."""
    sums = values.new_zeros((*values.shape[:-1], values.shape[-1] + 1)).scatter_add(-1, blocks + 1, values)
    return sums.gather(-1, blocks + 1)


def block_weights(
    masks: Bool[Tensor, "*rows replicate length"], blocks: Int[Tensor, "*rows length"]
) -> Float[Tensor, "*rows replicate length"]:
    """``n / m`` at masked positions and 0 elsewhere, where m of the n positions of a position's block are masked.

    The sum of these times log-probs is an unbiased estimate of the sum of the blocks' ELBOs, if the masks come from
    `draw_masks` with the same ``blocks``.
    """
    blocks = blocks[..., None, :].expand(masks.shape)
    sizes, counts = block_sums(torch.ones_like(blocks), blocks), block_sums(masks.long(), blocks)
    return torch.where(masks, sizes / counts.clamp(min=1), 0.0)


def position_ranks(noise: Float[Tensor, "*rows length"]) -> Int[Tensor, "*rows length"]:
    """The rank of each position in the random permutation that sorts ``noise``. Rank 0 comes first."""
    # A stable sort decides ties between equal draws in the same way on every device.
    return noise.argsort(dim=-1, stable=True).argsort(dim=-1)


def mask_count(uniform: Float[Tensor, "*rows"], length: int) -> Int[Tensor, "*rows"]:
    """Turns a uniform draw in (0, 1) into a count that is uniform on 1..length."""
    # In float32, a draw close to 1 times `length` may round up to `length` itself.
    return (uniform * length).long().clamp(max=length - 1) + 1


def antithetic_pair(
    rank: Int[Tensor, "*rows length"], count: Int[Tensor, "*rows"]
) -> tuple[Bool[Tensor, "*rows length"], Bool[Tensor, "*rows length"]]:
    """The masks {s_1..s_m} and {s_m..s_L} of a permutation s, given by the rank of each position, and a count m.

    What is masked in one is known in the other, so that errors of an average over both partly cancel. With m uniform on
    1..L, both counts are uniform on 1..L, and the ELBO estimate stays unbiased.
    """
    # The two share the position s_m. With exact complements the second mask would be empty at m = L, where an ELBO has
    # no estimate, and their average would be biased; tests/functional/test_functional_likelihood.py enumerates it.
    return rank < count[..., None], rank >= count[..., None] - 1


def trajectory_masks(
    reveal_step: Int[Tensor, "*rows length"], steps: int | range
) -> tuple[Bool[Tensor, "*rows steps length"], Bool[Tensor, "*rows steps length"]]:
    """What was masked before each denoising step of a recorded order, and what that step then revealed.

    ``reveal_step`` is the step that revealed each position, from 0. ``steps`` is how many steps to return from the
    first one on, or the range of steps to return.
    """
    chosen = range(steps) if isinstance(steps, int) else steps
    step = torch.arange(chosen.start, chosen.stop, device=reveal_step.device)[:, None]
    return reveal_step[..., None, :] >= step, reveal_step[..., None, :] == step


def complementary_masks(
    keys: Int[Tensor, "*rows"], counted: Bool[Tensor, "*rows length"], *, pairs: int
) -> Bool[Tensor, "*rows {pairs} 2 length"]:
    """Pairs of a mask, with a count uniform on 0..n, and its complement among the n ``counted`` positions; ESPO."""
    length = counted.shape[-1]
    noise = uniforms(keys, pairs * (length + 1)).unflatten(-1, (pairs, length + 1))
    size = counted.sum(-1)[..., None]
    count = (noise[..., length] * (size + 1)).long().minimum(size)
    first = counted_ranks(noise[..., :length], counted[..., None, :]) < count[..., None]
    return torch.stack((first, ~first), dim=-2) & counted[..., None, None, :]


def counted_ranks(
    noise: Float[Tensor, "*rows length"], counted: Bool[Tensor, "*#rows length"]
) -> Int[Tensor, "*rows length"]:
    """The rank of each counted position among them in the order that sorts ``noise``, in (0, 1). Others come behind."""
    return position_ranks(noise.masked_fill(~counted, 2.0))


def quadrature_masks(
    keys: Int[Tensor, "*rows"], counted: Bool[Tensor, "*rows length"]
) -> Bool[Tensor, "*rows nodes length"]:
    """A mask of ``int(t n)`` of the n counted positions for each node t of `QUADRATURE` (GDPO, arXiv 2510.08554)."""
    noise = uniforms(keys, len(QUADRATURE) * counted.shape[-1]).unflatten(-1, (len(QUADRATURE), -1))
    nodes = torch.tensor([node for node, _ in QUADRATURE], device=counted.device)
    count = (nodes * counted.sum(-1, keepdim=True)).long()
    return (counted_ranks(noise, counted[..., None, :]) < count[..., None]) & counted[..., None, :]


def block_random_masks(
    keys: Int[Tensor, "*rows"],
    counted: Bool[Tensor, "*rows length"],
    *,
    draws: int,
    block_length: int,
    perturbation: float,
) -> Bool[Tensor, "*rows {draws} length"]:
    """What a sampler of blocks may have before it, in the middle of a random block of ``block_length``; SPG.

    Of the block's counted positions 1 to all are masked, all behind it are, and before it each with probability
    ``perturbation``. ``counted`` is True up to the end of a completion.
    """
    length = counted.shape[-1]
    number = -(-length // block_length)
    noise = uniforms(keys, draws * (2 * length + 1) + number)
    order = position_ranks(noise[..., :number])[..., torch.arange(draws) % number]
    noise = noise[..., number:].unflatten(-1, (draws, 2 * length + 1))
    # Published: drawn without replacement, and then blocks behind the end are folded into those before.
    chosen = order % -(-counted.sum(-1, keepdim=True) // block_length)
    block = torch.arange(length, device=counted.device) // block_length
    counted, chosen = counted[..., None, :], chosen[..., None]
    own = (block == chosen) & counted
    hidden = counted_ranks(noise[..., :length], own) <= (noise[..., -1:] * own.sum(-1, keepdim=True)).long()
    earlier = (block < chosen) & (noise[..., length : 2 * length] < perturbation)
    return torch.where(own, hidden, earlier | (block > chosen) | ~counted)


def merged_steps(reveal_step: Int[Tensor, "*rows length"], size: int) -> Int[Tensor, "*rows length"]:
    """Recorded steps renumbered from 0, ``size`` neighbouring ones as one. Tokens that no step revealed stay at -1."""
    place = reveal_step.clamp(min=-1) + 1
    revealed = place.new_zeros((*place.shape[:-1], int(place.max()) + 1)).scatter(-1, place, 1)
    revealed[..., 0] = 0
    dense = (revealed.cumsum(-1) - 1).div(size, rounding_mode="floor")
    return torch.where(place > 0, dense.gather(-1, place), -1)
