"""The arithmetic that the native backbones share: RMSNorm, rotary positions, masks and attention."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """Root-mean-square normalisation. It is computed in float32, cast back, and scaled by a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # torch computes the mean square of half precision in float32 and casts back, as the published models do by
        # hand; said in float32 to torch, each half-precision state would be written and read once more. The weights
        # are applied in their own dtype, behind the cast.
        return self.weight * F.rms_norm(x, (x.shape[-1],), eps=self.eps)


RotaryTables = tuple[Float[Tensor, "rows 1 length turned"], Float[Tensor, "rows 1 length turned"]]
"""Cosines and sines, in float32, by which `apply_rotary` rotates heads, or as many dimensions of each."""


def rotary_tables(position_ids: Int[Tensor, "rows length"], head_size: int, theta: float) -> RotaryTables:
    """Tables for rotary positions with the base ``theta``, in the layout that pairs dimension i with i + size / 2."""
    exponent = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32) / head_size
    angles = (position_ids[..., None].float() * theta**-exponent)[:, None]
    cos, sin = angles.cos(), angles.sin()
    # A pair (x, y) becomes (x cos - y sin, y cos + x sin). With the minus sign kept in the table, the partner of every
    # dimension is its neighbour half a head away, and `apply_rotary` needs neither a negation nor a concatenation.
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rotary(
    x: Float[Tensor, "rows heads length size"], tables: RotaryTables
) -> Float[Tensor, "rows heads length size"]:
    """Rotates queries or keys by their positions, in float32, and casts back.

    Tables that are smaller than the heads rotate their first dimensions, and leave the others as they are.
    """
    cos, sin = tables
    if (size := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((apply_rotary(x[..., :size], tables), x[..., size:]), dim=-1)
    if x.dtype == cos.dtype:
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
    return _HalfPrecisionRotary.apply(x, cos, sin)


class _HalfPrecisionRotary(torch.autograd.Function):
    """The rotation of half-precision states, whose products and sum are made in float32 and rounded once.

    Autograd by itself would round each of the two terms of the gradient before it adds them. A rotation's gradient is
    the rotation back, by the negated sines, so nothing but the tables needs to be kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(incoming, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Mixed operands are promoted as they are read, so that the states themselves are never copied to float32.
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def padded_position_ids(
    input_ids: Int[Tensor, "rows length"] | Bool[Tensor, "rows length"],
    attention_mask: Bool[Tensor, "rows length"] | Int[Tensor, "rows length"] | None,
) -> Int[Tensor, "rows length"]:
    """Positions that count attended tokens only, so that left padding changes nothing.

    Padding itself gets position 0, which nobody attends to. Of ``input_ids`` only the shape counts, and only without a
    mask.
    """
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def key_padding_mask(
    attention_mask: Bool[Tensor, "rows *queries length"] | Int[Tensor, "rows *queries length"] | None,
) -> Bool[Tensor, "rows 1 _ length"] | None:
    """The mask that scaled_dot_product_attention takes: True where a query may attend to a key.

    A mask ``[rows length]`` of keys holds for all queries alike and becomes ``[rows 1 1 length]``. A mask of queries
    and keys, ``[rows length length]``, becomes ``[rows 1 length length]``.
    """
    if attention_mask is None:
        return None
    return attention_mask.bool()[:, None] if attention_mask.ndim == 3 else attention_mask.bool()[:, None, None]


def block_numbers(position_ids: Int[Tensor, "*positions"], block_size: int) -> Int[Tensor, "*positions"]:
    """The completion block of each position of a block-causal model, for the network, the likelihood and the samplers.

    Positions count attended tokens from 0, and the prompt's count as all others. Left padding therefore changes
    nothing, and a prompt whose length is no multiple of ``block_size`` shares its last block with the first tokens of
    its completion.
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

    A query attends to all positions of its own completion block and of earlier ones. ``attended`` takes keys away from
    that: from all queries alike, or where it is ``[rows queries keys]`` from each by itself. Queries are the columns
    from ``first_query`` on.
    """
    blocks = block_numbers(position_ids, block_size)
    mask = blocks[:, None, :] <= blocks[:, first_query:, None]
    if attended is not None:
        mask = mask & (attended.bool() if attended.ndim == 3 else attended.bool()[:, None])
    return mask[:, None]


def additive(mask: Bool[Tensor, "rows 1 _ keys"] | None, states: Tensor) -> Tensor | None:
    """A mask of queries and keys in the form that attention adds to its scores: 0, or minus infinity for False.

    scaled_dot_product_attention would make it of a boolean mask in every layer anew, and keep each for the backward
    pass. A mask of keys alone is small, and stays as it is.
    """
    if mask is None or mask.shape[2] == 1:
        return mask
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


Store = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes keys and values of a forward's own columns and returns those of all columns, as `KeyValueCache.store` does."""


def take(x: Tensor, at: Int[Tensor, "*at"] | None) -> Tensor:
    """Values ``[rows length ...]`` at flat indices into ``rows x length``, or all of them where ``at`` is None."""
    return x if at is None else x.flatten(0, 1)[at]


def queried(at: Int[Tensor, "*at"] | None, rows: int) -> Int[Tensor, "{rows} k"] | None:
    """The indices themselves where they name k queries of each row, which attention can restrict itself to, else None.

    By the contract of the native forwards, indices of the shape ``[rows k]`` lie in their own rows. Indices of any
    other shape may name more queries of one row than of another, and attention computes the same number for every row.
    """
    return at if at is not None and at.ndim == 2 and at.shape[0] == rows else None


def attention(
    query: Float[Tensor, "rows queries heads size"],
    key: Float[Tensor, "rows length key_heads size"],
    value: Float[Tensor, "rows length key_heads size"],
    rotary: RotaryTables,
    key_mask: Bool[Tensor, "rows 1 _ _"] | Float[Tensor, "rows 1 _ _"] | None,
    store: Store | None = None,
    at: Int[Tensor, "rows queries"] | None = None,
) -> Float[Tensor, "rows queries width"]:
    """Bidirectional attention with rotary positions. The result holds all heads side by side.

    Where there are fewer key heads than query heads, each key head serves several query heads. ``key_mask`` is that of
    `key_padding_mask`, or what is added to the scores (`additive`). ``store`` adds the keys and values of columns that
    this forward does not compute. ``at`` holds the flat indices of the queries' own columns, if ``query`` is of some
    columns only.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    own = rotary
    if at is not None:
        cos, sin = (take(table.squeeze(1), at).unsqueeze(1) for table in rotary)
        own = cos, sin
        # A mask of queries and keys has a row for every query; only those of the queries that are computed are wanted.
        if key_mask is not None and key_mask.shape[2] > 1:
            key_mask = take(key_mask.squeeze(1), at).unsqueeze(1)
    q, k = apply_rotary(q, own), apply_rotary(k, rotary)
    if store is not None:
        k, v = store(k, v)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, enable_gqa=q.shape[1] != k.shape[1])
    return mixed.transpose(1, 2).flatten(2)
