"""A copy of an adapted model with the adapters merged into the weights, for sampling."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class MergedCopy:
    """Shares all tensors with the model but the weights of adapted layers, of which it has its own.

    Not a module, so that it is no part of the model's parameters, state or device moves.

    Raises:
        ValueError: see `check`.
    """

    def __init__(self, model: Any) -> None:
        self.check(model)
        base = model.get_base_model()
        adapted = dict(_adapted(base))
        own = {id(layer.base_layer.weight) for layer in adapted.values()}
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers()) if id(tensor) not in own}
        self.model: nn.Module = copy.deepcopy(base, shared)
        for name in adapted:
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, self.model.get_submodule(name).base_layer)
        self.model.eval()

    @staticmethod
    def check(model: Any) -> None:
        """Raises ValueError for quantised or sharded layers, into which nothing can be merged."""
        for name, layer in _adapted(model.get_base_model()):
            weight = layer.base_layer.weight
            if type(layer.base_layer) is not nn.Linear or type(weight) is not nn.Parameter:
                raise ValueError(
                    f"Adapters cannot be merged for sampling into {name}, a {type(layer.base_layer).__name__} with a "
                    f"{type(weight).__name__}: leave `sample_merged` out with quantised or sharded weights."
                )

    @torch.no_grad()
    def renew(self, model: Any) -> None:
        """Takes over the adapters as they are now."""
        for name, layer in _adapted(model.get_base_model()):
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            weight: Any = self.model.get_submodule(name).weight
            weight.copy_(layer.base_layer.weight.to(delta.dtype) + delta)


def _adapted(base: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer))
