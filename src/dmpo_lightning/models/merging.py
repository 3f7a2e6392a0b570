"""A copy of an adapted model with the adapters merged into the weights, for sampling."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class MergedCopy:
    """A copy of an adapted model whose adapted layers have weights of their own, with the adapters merged in.

    All other tensors are those of the model itself, not copies, so that the copy costs no more than the adapted layers
    and follows every change to the rest. `renew` follows changes to the adapters.

    This is not a module, and the copy in it is thereby no part of the parameters, the state or the device moves of a
    module that holds it.

    Raises:
        ValueError: the layers cannot be merged into, see `check`.
    """

    def __init__(self, model: Any) -> None:
        self.check(model)
        base = model.get_base_model()
        adapted = dict(_adapted(base))
        own = {id(layer.base_layer.weight) for layer in adapted.values()}
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers()) if id(tensor) not in own}
        # A deep copy takes what its memo holds for already copied, and what it then refers to is the original tensor.
        self.model: nn.Module = copy.deepcopy(base, shared)
        # In place of PEFT's layer, which would add the adapters once more, stands the linear layer inside of it.
        for name in adapted:
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, self.model.get_submodule(name).base_layer)
        self.model.eval()

    @staticmethod
    def check(model: Any) -> None:
        """Raises ValueError where an adapted layer is quantised or sharded: nothing can be merged into its weights."""
        for name, layer in _adapted(model.get_base_model()):
            weight = layer.base_layer.weight
            if type(layer.base_layer) is not nn.Linear or type(weight) is not nn.Parameter:
                raise ValueError(
                    f"Adapters cannot be merged for sampling into {name}, a {type(layer.base_layer).__name__} with a "
                    f"{type(weight).__name__}: leave `sample_merged` out with quantised or sharded weights."
                )

    @torch.no_grad()
    def renew(self, model: Any) -> None:
        """Merges the adapters, as they are now, into the copy's weights. The model is only read."""
        for name, layer in _adapted(model.get_base_model()):
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            weight: Any = self.model.get_submodule(name).weight
            # Added in the adapters' dtype, and rounded once to that of the weights.
            weight.copy_(layer.base_layer.weight.to(delta.dtype) + delta)


def _adapted(base: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer))
