"""Block-causal attention: masked diffusion within a block of positions, autoregressive from block to block.

One rule says which block a position belongs to, and everybody who needs to know asks it: the network, the likelihood
and the samplers. Models are then trained on the blocks that they sample.
"""

from jaxtyping import Bool, Int
from torch import Tensor


def block_numbers(position_ids: Int[Tensor, "*positions"], block_size: int) -> Int[Tensor, "*positions"]:
    """The block of each position. Positions count attended tokens from 0, and the prompt's count as all others.

    Left padding therefore changes nothing, and a prompt whose length is no multiple of ``block_size`` shares its last
    block with the first tokens of its completion.
    """
    return position_ids // block_size


def block_causal_mask(
    position_ids: Int[Tensor, "rows keys"],
    attended: Bool[Tensor, "rows *queries keys"] | Int[Tensor, "rows *queries keys"] | None,
    block_size: int,
    *,
    first_query: int = 0,
) -> Bool[Tensor, "rows 1 queries_ keys"]:
    """The mask that scaled_dot_product_attention takes: True where a query may attend to a key.

    A query attends to all positions of its own block and of earlier ones. ``attended`` takes keys away from that: from
    all queries alike, or where it is ``[rows queries keys]`` from each by itself. Queries are the columns from
    ``first_query`` on.
    """
    blocks = block_numbers(position_ids, block_size)
    mask = blocks[:, None, :] <= blocks[:, first_query:, None]
    if attended is not None:
        mask = mask & (attended.bool() if attended.ndim == 3 else attended.bool()[:, None])
    return mask[:, None]
