"""Keys and values of every transformer layer and column, kept between forwards that compute a part of the columns."""

from dataclasses import dataclass
from functools import partial

from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.models.layers import RotaryTables, Store, padded_position_ids, rotary_tables


class LayerCache:
    """The keys (already rotated) and values of one layer, ``[rows heads columns head_size]``.

    They live in buffers of their own, which the first `update` allocates, because it is the first to see their type.
    """

    def __init__(self, columns: int, *, grows: bool = False) -> None:
        self.columns, self.grows = columns, grows
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(
        self, keys: Float[Tensor, "rows heads part size"], values: Float[Tensor, "rows heads part size"], start: int
    ) -> tuple[Float[Tensor, "rows heads columns size"], Float[Tensor, "rows heads columns size"]]:
        """Writes the part of the columns that begins at ``start``, and returns the keys and values of all columns.

        Columns outside of that part are returned as they were written last. Where the cache grows, columns behind that
        part are not returned.
        """
        if self.keys is None or self.values is None:
            shape = (*keys.shape[:2], self.columns, keys.shape[-1])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        stop = start + keys.shape[2]
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values
        return (self.keys[:, :, :stop], self.values[:, :, :stop]) if self.grows else (self.keys, self.values)

    def select(self, rows: Int[Tensor, " selected"]) -> None:
        """Keeps these rows, in this order. A row may be named several times."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


class KeyValueCache:
    """What a native model needs to compute a part of the columns while attending to all of them.

    The first forward has to cover every column, unless the cache grows. Later forwards overwrite the columns that they
    cover. Positions count attended columns only, as they do in a forward without a cache.

    Args:
        attention_mask: False on left padding. Its width is the number of columns.
        is_padded: False says that there is no padding. Attention then gets no mask.
        grows: a forward attends to no column behind its own, as in block-causal models. Columns are then filled from
            left to right, and a forward costs nothing for those that are still empty.
    """

    def __init__(
        self, attention_mask: Bool[Tensor, "rows columns"], *, is_padded: bool = True, grows: bool = False
    ) -> None:
        self.attention_mask, self.is_padded, self.grows = attention_mask, is_padded, grows
        self.layers: dict[int, LayerCache] = {}
        self._tables: RotaryTables | None = None
        self._derive()

    def store(self, number: int, start: int) -> Store:
        """The function that stores what layer ``number`` computed for the columns from ``start`` on."""
        empty = LayerCache(self.attention_mask.shape[1], grows=self.grows)
        return partial(self.layers.setdefault(number, empty).update, start=start)

    def rotary(self, start: int, length: int, head_size: int, theta: float) -> RotaryTables:
        """The rotary tables of ``length`` columns from ``start`` on, cut from those of all columns."""
        if self._tables is None:  # computed once: a cache serves many short forwards
            self._tables = rotary_tables(self.position_ids, head_size, theta)
        cos, sin = self._tables
        return cos[:, :, start : start + length], sin[:, :, start : start + length]

    def seen(self, stop: int) -> tuple[Int[Tensor, "rows seen"], Bool[Tensor, "rows seen"] | None]:
        """Positions and mask of the columns that a forward up to ``stop`` may attend to. No mask, no padding."""
        end = stop if self.grows else None
        return self.position_ids[:, :end], self.attention_mask[:, :end] if self.is_padded else None

    def select(self, rows: Int[Tensor, " selected"]) -> None:
        """Keeps these rows, in this order. A row may be named several times."""
        self.attention_mask = self.attention_mask[rows]
        for layer in self.layers.values():
            layer.select(rows)
        self._derive()

    def _derive(self) -> None:
        """Works out what follows from the attention mask, and drops the rotary tables of an earlier one."""
        self.position_ids = padded_position_ids(self.attention_mask, self.attention_mask)
        self._tables = None


@dataclass(frozen=True)
class Columns:
    """Where the columns of a forward stand: at ``position_ids``, or among those of a ``cache``, from ``start`` on.

    Without either, positions count attended tokens.
    """

    position_ids: Int[Tensor, "rows length"] | None = None
    cache: KeyValueCache | None = None
    start: int = 0
