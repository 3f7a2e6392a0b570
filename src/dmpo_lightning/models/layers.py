"""Building blocks shared by the native backbones: RMSNorm, rotary positions, padding masks, and log-probs at chosen
positions.
"""

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


def gather_positions(hidden: Tensor, positions: Tensor | None) -> Tensor:
    """Hidden states at flat indices into ``rows x length``, any index shape; all of them for None."""
    return hidden if positions is None else hidden.flatten(0, 1)[positions]


def log_probs_of(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Float32 log-probability of each target under softmax(logits / temperature)."""
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    return -F.cross_entropy(scaled.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
