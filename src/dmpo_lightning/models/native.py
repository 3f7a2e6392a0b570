"""What the forwards of the native backbones share: positions, padding, caches, and a last block for a few queries."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.models.layers import (
    Store,
    key_padding_mask,
    padded_position_ids,
    queried,
    rotary_tables,
    take,
)


@dataclass(frozen=True)
class Geometry:
    """At which positions the columns of a forward stand, and what they may attend to."""

    rotary: tuple[Tensor, Tensor]
    key_mask: Tensor | None
    cache: KeyValueCache | None = None
    start: int = 0
    """The first column that the forward computes, with a cache."""

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KeyValueCache | None,
        start: int,
        *,
        head_size: int,
        theta: float,
    ) -> "Geometry":
        """The geometry of ids ``[rows length]``. A cache has a mask and positions of its own, for all columns."""
        if cache is not None:
            return cls(cache.rotary(start, input_ids.shape[1], head_size, theta), cache.key_mask, cache, start)
        if position_ids is None:
            position_ids = padded_position_ids(input_ids, attention_mask)
        return cls(rotary_tables(position_ids, head_size, theta), key_padding_mask(attention_mask))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, geometry: Geometry, at: Tensor | None = None) -> Tensor:
    """Passes states ``[rows length width]`` through all blocks.

    Where ``at`` holds flat indices ``[rows k]``, the last block computes the states of these queries alone, for nothing
    follows that would attend to the others.
    """
    mask = additive(geometry.key_mask, x)
    *numbered, (last, last_block) = enumerate(blocks)
    for number, block in numbered:
        x = block(x, geometry.rotary, mask, _store(geometry, number))
    return last_block(x, geometry.rotary, mask, _store(geometry, last), queried(at, x.shape[0]))


def additive(mask: Tensor | None, states: Tensor) -> Tensor | None:
    """A mask of queries and keys in the form that attention adds to its scores: 0, or minus infinity for False.

    scaled_dot_product_attention would make it of a boolean mask in every block anew, and keep each for the backward
    pass. A mask of keys alone is small, and stays as it is.
    """
    if mask is None or mask.shape[2] == 1:
        return mask
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def at_positions(states: Tensor, at: Tensor | None, rows: int) -> Tensor:
    """Restricts what `run_blocks` returned to ``at``, unless its last block has done so already."""
    return states if queried(at, rows) is not None else take(states, at)


def _store(geometry: Geometry, number: int) -> Store | None:
    return None if geometry.cache is None else geometry.cache.store(number, geometry.start)
