"""Mixtures of experts: a router sends each token to some of many MLPs, which are stacked in memory.

One grouped product serves all of them. Files hold them one by one under their published names: transformers stacks them
as it loads them, and takes them apart as it saves them.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping


def check_experts(config: Any) -> None:
    """Raises ValueError for fewer experts than a token gets, and for widths that grouped products do not take."""
    name = type(config).__name__.removesuffix("Config")
    if config.num_experts_per_tok > config.num_experts:
        raise ValueError(
            f"`num_experts_per_tok` of {name} must be at most `num_experts`, got {config.num_experts_per_tok} of "
            f"{config.num_experts}."
        )
    if config.hidden_size % 8 or config.moe_intermediate_size % 8:
        raise ValueError(
            f"`hidden_size` and `moe_intermediate_size` of {name} must be multiples of 8, as grouped products of "
            f"bfloat16 need them, got {config.hidden_size} and {config.moe_intermediate_size}."
        )


def stack_on_loading(model_type: str) -> None:
    """Has transformers stack the experts of a family's files, which it knows how to do for Qwen2-MoE."""
    register_checkpoint_conversion_mapping(model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


class Router(nn.Module, ABC):
    """Says which experts a token goes to, from a score of each."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, self.k = config.num_experts, config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    @abstractmethod
    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of the experts of each token ``[tokens width]``, and how much they count, both ``[tokens k]``."""


class Experts(nn.Module):
    """SiLU-gated MLPs side by side, of which each token goes through some."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        number, width, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(number, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(number, width, inner))

    def forward(self, h: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of what its experts say to each token ``[tokens width]``. See `Router`."""
        order = chosen.flatten().argsort(stable=True)
        # Counted as a sum over a table, because a count by `bincount` depends on how the device schedules it.
        ends = F.one_hot(chosen.flatten(), len(self.down_proj)).sum(0).cumsum(0).int()
        gate, up = self._products(h[order // chosen.shape[1]], self.gate_up_proj, ends).chunk(2, -1)
        said = self._products(F.silu(gate) * up, self.down_proj, ends)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return (said[back].unflatten(0, chosen.shape) * weights[..., None]).sum(1).to(h.dtype)

    @staticmethod
    def _products(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Each run of rows, up to its end, times the weights of its expert. An expert without rows costs nothing."""
        # Autocast does not know grouped products.
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights.dtype
        return F.grouped_mm(rows.to(dtype), weights.to(dtype).transpose(-2, -1), offs=ends)


class MixtureMLP(nn.Module):
    """The experts that a token is sent to, and one that all tokens share, if there is one."""

    def __init__(self, router: Router, experts: Experts, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.experts = router, experts
        if shared is not None:
            self.shared_experts = shared

    def forward(self, h: Tensor) -> Tensor:
        tokens = h.flatten(0, -2)
        routed = self.experts(tokens, *self.gate(tokens)).view_as(h)
        return routed + self.shared_experts(h) if hasattr(self, "shared_experts") else routed
