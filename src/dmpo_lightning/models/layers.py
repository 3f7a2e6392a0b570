"""Building blocks shared by the native backbones: RMSNorm, rotary positions, padding masks, and log-probs at chosen
positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput


class RMSNorm(nn.Module):
    """Root-mean-square normalisation computed in float32, then cast back and scaled."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype)


def rotary_tables(position_ids: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[rows 1 length head_size]`` in float32, for the half-rotated layout."""
    exponent = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32) / head_size
    angles = position_ids[..., None].float() * theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates ``[rows heads length head_size]`` in float32 and casts back."""
    cos, sin = tables
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def padded_position_ids(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Positions that count attended tokens only, so that left padding changes nothing. ``[rows length]``"""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def key_padding_mask(attention_mask: Tensor | None) -> Tensor | None:
    """The mask SDPA takes: True where a key may be attended, for all queries alike. ``[rows 1 1 length]``"""
    return None if attention_mask is None else attention_mask.bool()[:, None, None, :]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_size: int,
    rotary: tuple[Tensor, Tensor],
    key_mask: Tensor | None,
) -> Tensor:
    """Bidirectional rotary attention on projections ``[rows length heads*head_size]``; fewer key heads are shared."""
    heads = [x.unflatten(-1, (-1, head_size)).transpose(1, 2) for x in (query, key, value)]
    attended = F.scaled_dot_product_attention(
        apply_rotary(heads[0], rotary),
        apply_rotary(heads[1], rotary),
        heads[2],
        attn_mask=key_mask,
        enable_gqa=heads[0].shape[1] != heads[1].shape[1],
    )
    return attended.transpose(1, 2).flatten(2)


def predict(
    head: nn.Module,
    hidden: Tensor,
    positions: Tensor | None,
    targets: Tensor | None,
    logit_bias: Tensor | None,
    temperature: float,
) -> MaskedLMOutput | Tensor:
    """The head at flat indices into ``rows x length``: logits, or float32 log-probs of ``targets``; see
    `LLaDAForMaskedDiffusion`.
    """
    logits = head(hidden if positions is None else hidden.flatten(0, 1)[positions])
    if logit_bias is not None:
        logits = logits + logit_bias
    if positions is None:
        return MaskedLMOutput(logits=logits)
    return logits if targets is None else log_probs_of(logits, targets, temperature)


def log_probs_of(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Float32 log-probability of each target under softmax(logits / temperature)."""
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    return -F.cross_entropy(scaled.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
