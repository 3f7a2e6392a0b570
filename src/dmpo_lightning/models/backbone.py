"""What the forwards of the native backbones share: positions, padding, caches, and a last block at a few places."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.models.layers import key_padding_mask, padded_position_ids, rotary_tables


@dataclass(frozen=True)
class Geometry:
    """Where the columns of a forward stand and what they may attend to."""

    rotary: tuple[Tensor, Tensor]
    key_mask: Tensor | None
    cache: KeyValueCache | None = None
    start: int = 0
    """First column of the forward, with a cache."""

    @classmethod
    def of(
        cls,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KeyValueCache | None,
        start: int,
        *,
        head_size: int,
        theta: float,
    ) -> "Geometry":
        """Of states ``[rows length width]``. A cache brings its own mask and positions, which hold for all columns."""
        if cache is not None:
            return cls(cache.rotary(start, x.shape[1], head_size, theta), cache.key_mask, cache, start)
        if position_ids is None:
            position_ids = padded_position_ids(x[..., 0], attention_mask)
        return cls(rotary_tables(position_ids, head_size, theta), key_padding_mask(attention_mask))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, geometry: Geometry, at: Tensor | None = None) -> Tensor:
    """States ``[rows length width]`` through all blocks; the last computes those at flat indices ``at`` alone."""
    *numbered, (last, last_block) = enumerate(blocks)
    for number, block in numbered:
        x = block(x, geometry.rotary, geometry.key_mask, _store(geometry, number))
    return last_block(x, geometry.rotary, geometry.key_mask, _store(geometry, last), at)


def _store(geometry: Geometry, number: int) -> object:
    return None if geometry.cache is None else geometry.cache.store(number, geometry.start)
