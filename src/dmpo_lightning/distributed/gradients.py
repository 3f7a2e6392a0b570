"""The norm of a gradient that may be divided among ranks."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm of all gradients as one vector, the same on each rank. It is 0 where there are none.

    All ranks call it, after the gradients were averaged over them. Not for DeepSpeed, which hides gradients and knows
    their norm behind its step (`engine_norm`).
    """
    if isinstance(model, FullyShardedDataParallel):
        # Its only way to a norm over all ranks. Clipped to infinity, gradients are multiplied by exactly 1.
        return model.clip_grad_norm_(math.inf)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    # Under FSDP2 the parts of all ranks are added up here, in one reduction.
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def engine_norm(engine: Any) -> float | None:
    """The same of the last optimizer step of a DeepSpeed engine, None where it was told not to compute it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
