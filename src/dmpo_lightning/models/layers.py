"""Building blocks shared by the native backbones: RMSNorm, rotary positions, padding masks, attention."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square normalisation computed in float32, then cast back and scaled."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype)


def rotary_tables(position_ids: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines, and sines whose first half is negated, ``[rows 1 length head_size]`` in float32, for the half-rotated
    layout.
    """
    exponent = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32) / head_size
    angles = (position_ids[..., None].float() * theta**-exponent)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rotary(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates ``[rows heads length head_size]`` in float32 and casts back."""
    cos, sin = tables
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def padded_position_ids(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Positions that count attended tokens only, so that left padding changes nothing. ``[rows length]``"""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def key_padding_mask(attention_mask: Tensor | None) -> Tensor | None:
    """The mask SDPA takes, True where a key may be attended: ``[rows 1 1 length]``, for all queries alike, or
    ``[rows 1 length length]`` from a mask of queries and keys.
    """
    if attention_mask is None:
        return None
    return attention_mask.bool()[:, None] if attention_mask.ndim == 3 else attention_mask.bool()[:, None, None]


Store = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From the keys and values of a forward's own columns to those of all columns, see `KeyValueCache.store`."""


def take(x: Tensor, at: Tensor | None) -> Tensor:
    """States ``[rows length ...]`` at flat indices into ``rows x length``; all of them where ``at`` is None."""
    return x if at is None else x.flatten(0, 1)[at]


def queried(at: Tensor | None, rows: int) -> Tensor | None:
    """Flat indices ``[rows k]`` name k queries of each row, which attention can restrict itself to; indices of another
    shape cannot be told apart by row.
    """
    return at if at is not None and at.ndim == 2 and at.shape[0] == rows else None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_size: int,
    rotary: tuple[Tensor, Tensor],
    key_mask: Tensor | None,
    store: Store | None = None,
    at: Tensor | None = None,
) -> Tensor:
    """Bidirectional rotary attention on projections ``[rows length heads*head_size]``; fewer key heads are shared.

    ``store`` adds the keys and values of other columns, ``at`` says which columns the queries stand in.
    """
    q, k, v = (x.unflatten(-1, (-1, head_size)).transpose(1, 2) for x in (query, key, value))
    q, k = apply_rotary(q, rotary if at is None else _tables_at(rotary, at)), apply_rotary(k, rotary)
    if at is not None and key_mask is not None and key_mask.shape[2] > 1:
        key_mask = take(key_mask.squeeze(1), at).unsqueeze(1)
    if store is not None:
        k, v = store(k, v)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, enable_gqa=q.shape[1] != k.shape[1])
    return mixed.transpose(1, 2).flatten(2)


def _tables_at(rotary: tuple[Tensor, Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (take(table.squeeze(1), at).unsqueeze(1) for table in rotary)
    return cos, sin
